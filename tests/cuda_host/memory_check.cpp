#include "memory_check.h"

#include <algorithm>
#include <vector>

namespace backmatch::emulator {
namespace {

constexpr std::uintptr_t kWord = 4;
constexpr int kWarpThreads = 32;
// Blocks that no block of the running launch races with.
constexpr int64_t kNever = -1, kEarlierLaunch = -2;

struct Shadow {
  Moment writer;
  Moment readers[2];  // the newest of two different warps
};

struct Region {
  std::string name;
  std::uintptr_t start, end, guard;
  Contents contents;
  std::vector<Shadow> words;
};

std::vector<Region> regions;
const Moment* current = nullptr;
std::string finding;
void (*stop_thread)() = nullptr;

void found(const std::string& what) {
  finding = what + ": block " + std::to_string(current->block) + " thread " +
            std::to_string(current->thread);
}

bool races(const Moment& before, const Moment& now) {
  if (before.block < 0) return false;
  if (before.block != now.block) return true;
  if (before.thread == now.thread || before.block_barriers != now.block_barriers) return false;
  const bool same_warp = before.thread / kWarpThreads == now.thread / kWarpThreads;
  return !same_warp || before.warp_barriers == now.warp_barriers;
}

// Does not return. The thread goes no further: what it would read next could be an address out of
// nowhere.
void report(const Region& region, const char* what, std::uintptr_t address, const Moment* other) {
  const int64_t offset = static_cast<int64_t>(address) - static_cast<int64_t>(region.start);
  found(std::string(what) + " at byte " + std::to_string(offset) + " of " + region.name);
  if (other != nullptr) {
    finding += " and block " + std::to_string(other->block) + " thread " +
               std::to_string(other->thread);
  }
  stop_thread();
}

void note_reader(Shadow& shadow, const Moment& now) {
  for (Moment& reader : shadow.readers) {
    const bool same_warp = reader.block == now.block &&
                           reader.thread / kWarpThreads == now.thread / kWarpThreads;
    if (same_warp || reader.block < 0 || reader.block_barriers != now.block_barriers) {
      reader = now;
      return;
    }
  }
}

void check_word(Region& region, std::uintptr_t address, bool write) {
  Shadow& shadow = region.words[(address - region.start) / kWord];
  if (races(shadow.writer, *current)) report(region, "race", address, &shadow.writer);
  if (!write) {
    if (shadow.writer.block == kNever && region.contents == Contents::kOutput) {
      report(region, "read of uninitialised memory", address, nullptr);
    }
    note_reader(shadow, *current);
    return;
  }
  if (region.contents == Contents::kInput) report(region, "write to an input", address, nullptr);
  for (const Moment& reader : shadow.readers) {
    if (races(reader, *current)) report(region, "race", address, &reader);
  }
  shadow.writer = *current;
}

void check_access(const void* pointer, std::uintptr_t bytes, bool write) {
  if (current == nullptr) return;
  const auto address = reinterpret_cast<std::uintptr_t>(pointer);
  for (Region& region : regions) {
    if (address + bytes <= region.start - region.guard || address >= region.end + region.guard) {
      continue;
    }
    if (address < region.start || address + bytes > region.end) {
      report(region, write ? "write out of bounds" : "read out of bounds", address, nullptr);
      return;
    }
    for (std::uintptr_t a = address; a < address + bytes; a += kWord) check_word(region, a, write);
    return;
  }
}

}  // namespace

void watch(const char* name, const void* start, int64_t bytes, int64_t guard, Contents contents) {
  const auto address = reinterpret_cast<std::uintptr_t>(start);
  regions.push_back({name, address, address + static_cast<std::uintptr_t>(bytes),
                     static_cast<std::uintptr_t>(guard), contents,
                     std::vector<Shadow>(static_cast<std::size_t>(bytes) / kWord + 1)});
}

void forget_all() { regions.clear(); }

void forget(const char* name) {
  const auto named = [&](const Region& region) { return region.name == name; };
  regions.erase(std::remove_if(regions.begin(), regions.end(), named), regions.end());
}

void forget_accesses(const char* name) {
  for (Region& region : regions) {
    if (region.name == name) region.words.assign(region.words.size(), Shadow{});
  }
}

void order_accesses() {
  for (Region& region : regions) {
    for (Shadow& shadow : region.words) {
      const int64_t block = shadow.writer.block == kNever ? kNever : kEarlierLaunch;
      shadow = Shadow{};
      shadow.writer.block = block;
    }
  }
}

void require_aligned(const void* pointer, std::size_t bytes) {
  if (reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0) return;
  found("address not a multiple of " + std::to_string(bytes));
  stop_thread();
}

void set_stop(void (*stop)()) { stop_thread = stop; }

void set_current(const Moment* moment) { current = moment; }

std::string take_finding() {
  std::string result;
  result.swap(finding);
  return result;
}

}  // namespace backmatch::emulator

// What compilers call in code built with -fsanitize=thread.
#define BACKMATCH_HOOK(bytes)                                                              \
  void __tsan_read##bytes(void* p) { backmatch::emulator::check_access(p, bytes, false); } \
  void __tsan_write##bytes(void* p) { backmatch::emulator::check_access(p, bytes, true); } \
  void __tsan_unaligned_read##bytes(void* p) {                                             \
    backmatch::emulator::check_access(p, bytes, false);                                    \
  }                                                                                        \
  void __tsan_unaligned_write##bytes(void* p) {                                            \
    backmatch::emulator::check_access(p, bytes, true);                                     \
  }

extern "C" {
BACKMATCH_HOOK(1)
BACKMATCH_HOOK(2)
BACKMATCH_HOOK(4)
BACKMATCH_HOOK(8)
BACKMATCH_HOOK(16)
void __tsan_read_range(void* p, unsigned long bytes) {
  backmatch::emulator::check_access(p, bytes, false);
}
void __tsan_write_range(void* p, unsigned long bytes) {
  backmatch::emulator::check_access(p, bytes, true);
}
void* __tsan_memcpy(void* to, const void* from, unsigned long bytes) {
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  return __builtin_memcpy(to, from, bytes);
}
void* __tsan_memset(void* to, int value, unsigned long bytes) {
  __tsan_write_range(to, bytes);
  return __builtin_memset(to, value, bytes);
}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
