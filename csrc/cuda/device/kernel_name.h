// The name of a kernel with its template arguments, for messages and reports.
#pragma once

#include <algorithm>
#include <string>

namespace backmatch::cuda {

// "spd_solve_thread_kernel<float, 8>" out of `function`, the compiler's own text
// (__PRETTY_FUNCTION__) for a function template <auto kernel, class... Args>.
inline std::string kernel_name(const std::string& function) {
  const std::string before = "kernel = ";
  const std::size_t start = function.find(before) + before.size();
  const std::size_t end = std::min({function.find("; Args", start), function.find(", Args", start),
                                    function.find_last_of(']')});
  std::string name = function.substr(start, end - start);
  for (const std::string noise : {"&", "backmatch::cuda::"}) {
    for (std::size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, noise.size());
  }
  return name;
}

}  // namespace backmatch::cuda
