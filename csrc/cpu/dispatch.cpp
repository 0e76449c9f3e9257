#include "dispatch.h"

#include <atomic>
#include <cstring>
#include <stdexcept>
#include <string>

namespace backmatch {

namespace baseline {
extern const Level level;
}
#ifdef BACKMATCH_X86_LEVELS
namespace avx2 {
extern const Level level;
}
namespace avx512 {
extern const Level level;
}
#endif

namespace {

struct Entry {
  const char* name;
  const Level* level;
  bool (*supported)();
};

#ifdef BACKMATCH_X86_LEVELS
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
}
#endif

const Entry kEntries[] = {
    {"baseline", &baseline::level, [] { return true; }},
#ifdef BACKMATCH_X86_LEVELS
    {"avx2", &avx2::level, has_avx2},
    {"avx512", &avx512::level, has_avx512},
#endif
};

const Entry* best_entry() {
  const Entry* best = kEntries;
  for (const Entry& entry : kEntries)
    if (entry.supported()) best = &entry;
  return best;
}

std::atomic<const Entry*>& active_entry() {
  static std::atomic<const Entry*> entry{best_entry()};
  return entry;
}

}  // namespace

int compiled_levels(const char* (&names)[kMostLevels]) {
  int count = 0;
  for (const Entry& entry : kEntries) names[count++] = entry.name;
  return count;
}

const Level& active_level() { return *active_entry().load()->level; }

const char* active_level_name() { return active_entry().load()->name; }

void set_active_level(const char* name) {
  std::string known;
  for (const Entry& entry : kEntries) {
    if (std::strcmp(entry.name, name) == 0) {
      if (!entry.supported())
        throw std::invalid_argument("SIMD level '" + std::string(name) +
                                    "': this processor lacks its instructions");
      active_entry() = &entry;
      return;
    }
    known += known.empty() ? entry.name : std::string(", ") + entry.name;
  }
  throw std::invalid_argument("SIMD level '" + std::string(name) +
                              "' is not in this build, which has: " + known);
}

}  // namespace backmatch
