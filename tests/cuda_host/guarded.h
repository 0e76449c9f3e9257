// How the C faces of the emulated kernels tell what went wrong.
#pragma once

#include <exception>
#include <string>

inline std::string message;  // no static local: its guard would need the sanitizer's atomics

// Calls; returns an empty string, or what was thrown, valid until the next call.
template <class Call>
const char* guarded(const Call& call) {
  message.clear();
  try {
    call();
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}
