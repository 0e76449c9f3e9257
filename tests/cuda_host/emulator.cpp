// The checked longjmp takes a jump to another stack for an error.
#undef _FORTIFY_SOURCE

#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "memory_check.h"

namespace backmatch::emulator {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr int64_t kGuardBytes = 4096;
constexpr const char* kShared = "shared memory";

enum class Wait { kNone, kBlock, kSyncWarp, kExchange, kBallot, kEnd };

// Where a thread of control left off. Only its first entry goes through ucontext: swapcontext asks
// the operating system for the signal mask at every switch, which took a third of the time.
struct Place {
  jmp_buf jump;
  ucontext_t entry;
  bool entered = false;
};

void change(Place& from, Place& to) {
  if (_setjmp(from.jump) != 0) return;
  from.entered = true;
  if (to.entered) _longjmp(to.jump, 1);
  setcontext(&to.entry);
}

struct Fiber {
  Place place;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  Moment moment;
  Wait wait = Wait::kNone;
  unsigned exchanges = 0;  // shuffles and ballots so far
  std::vector<PendingCopy> copies;
};

struct Warp {
  int waiting = 0;
  Wait kind = Wait::kNone;
  // Two sets of slots in turn: a lane can be at most one exchange ahead of another.
  unsigned char slots[2][kWarp][kSlotBytes];
};

uint64_t order_seed = 0;
std::string left_out_file;
int left_out_line = 0;
DeviceLimits limits{232448, 2};

// One launch. A fiber runs until it waits; `ready` holds those that may run.
class Block {
 public:
  Block(const char* name, const LaunchShape& shape, const std::function<void()>& body)
      : name_(name), shape_(shape), body_(body), random_(order_seed), fibers_(shape.threads),
        warps_(shape.threads / kWarp), memory_(shape.shared_bytes + 2 * kGuardBytes + 16) {
    void* start = memory_.data() + kGuardBytes;
    std::size_t room = static_cast<std::size_t>(shape.shared_bytes) + 16;
    shared_ = static_cast<unsigned char*>(
        std::align(16, static_cast<std::size_t>(shape.shared_bytes), start, room));
    watch(kShared, shared_, shape.shared_bytes, kGuardBytes, Contents::kOutput);
  }

  ~Block() { forget(kShared); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void run_all() {
    std::vector<int64_t> order(shape_.blocks);
    std::iota(order.begin(), order.end(), int64_t(0));
    std::shuffle(order.begin(), order.end(), random_);
    for (const int64_t index : order) run_block(index);
  }

  Fiber& fiber() { return *running_; }
  const LaunchShape& shape() const { return shape_; }
  unsigned char* shared() { return shared_; }
  // Where the lanes of the running fiber's warp leave what they exchange.
  auto& next_slots() {
    return warps_[running_->moment.thread / kWarp].slots[running_->exchanges++ % 2];
  }
  void run_body() { body_(); }

  // Hands over to the scheduler; returns when all who must have arrived have.
  void wait_for(Wait kind) {
    running_->wait = kind;
    change(running_->place, scheduler_);
  }

 private:
  void run_block(int64_t index);
  void start(Fiber& fiber, int64_t block, int thread);
  void resume(int thread);
  void arrive(int thread);
  void release_block();
  [[noreturn]] void fail(const std::string& what) const {
    throw std::runtime_error(std::string(name_) + ": " + what);
  }
  [[noreturn]] void fail_deadlock() const;

  const char* name_;
  LaunchShape shape_;
  const std::function<void()>& body_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  std::vector<Warp> warps_;
  std::vector<unsigned char> memory_;
  unsigned char* shared_;
  Place scheduler_;
  std::vector<int> ready_;
  Fiber* running_ = nullptr;
  int at_block_barrier_ = 0;
  int ended_ = 0;
};

Block* active = nullptr;

// A fiber runs one thread of every block of its launch.
void fiber_main() {
  for (;;) {
    active->run_body();
    active->wait_for(Wait::kEnd);
  }
}

void Block::start(Fiber& fiber, int64_t block, int thread) {
  fiber.moment = Moment{block, thread, 0, 0};
  fiber.wait = Wait::kNone;
  fiber.exchanges = 0;
  fiber.copies.clear();
  if (fiber.place.entered) return;  // it ended the thread of the block before and goes on
  ucontext_t& entry = fiber.place.entry;
  getcontext(&entry);
  entry.uc_stack.ss_sp = fiber.stack.get();
  entry.uc_stack.ss_size = kStackBytes;
  entry.uc_link = nullptr;
  makecontext(&entry, fiber_main, 0);
}

void Block::run_block(int64_t index) {
  std::memset(memory_.data(), 0xff, memory_.size());  // a NaN in either precision
  forget_accesses(kShared);
  warps_.assign(warps_.size(), Warp{});
  at_block_barrier_ = ended_ = 0;
  ready_.resize(fibers_.size());
  std::iota(ready_.begin(), ready_.end(), 0);
  for (int thread = 0; thread < shape_.threads; ++thread) start(fibers_[thread], index, thread);

  while (!ready_.empty()) {
    const std::size_t pick = random_() % ready_.size();
    const int thread = ready_[pick];
    ready_[pick] = ready_.back();
    ready_.pop_back();
    resume(thread);
    arrive(thread);
  }
  if (ended_ != shape_.threads) fail_deadlock();
}

void Block::resume(int thread) {
  running_ = &fibers_[thread];
  running_->wait = Wait::kNone;
  set_current(&running_->moment);
  change(scheduler_, running_->place);
  set_current(nullptr);
  const std::string finding = take_finding();
  if (!finding.empty()) fail(finding);
}

void Block::arrive(int thread) {
  const Wait kind = fibers_[thread].wait;
  if (kind == Wait::kEnd) {
    ++ended_;
    return;
  }
  if (kind == Wait::kBlock) {
    if (++at_block_barrier_ == shape_.threads) release_block();
    return;
  }
  Warp& warp = warps_[thread / kWarp];
  if (warp.waiting > 0 && warp.kind != kind) fail("lanes of one warp wait at different barriers");
  warp.kind = kind;
  if (++warp.waiting < kWarp) return;
  warp.waiting = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    const int member = thread / kWarp * kWarp + lane;
    if (kind == Wait::kSyncWarp) ++fibers_[member].moment.warp_barriers;
    ready_.push_back(member);
  }
}

void Block::release_block() {
  at_block_barrier_ = 0;
  for (int thread = 0; thread < shape_.threads; ++thread) {
    ++fibers_[thread].moment.block_barriers;
    ready_.push_back(thread);
  }
}

void Block::fail_deadlock() const {
  const int in_warps = shape_.threads - ended_ - at_block_barrier_;
  fail("deadlock: " + std::to_string(at_block_barrier_) + " threads wait for the block, " +
       std::to_string(in_warps) + " for their warp, " + std::to_string(ended_) + " have ended");
}

}  // namespace

void configure(uint64_t seed, const DeviceLimits& device) {
  order_seed = seed;
  limits = device;
}

const DeviceLimits& device_limits() { return limits; }

void run(const char* name, const LaunchShape& shape, const std::function<void()>& body) {
  if (shape.threads <= 0 || shape.threads > 1024 || shape.threads % kWarp != 0 ||
      shape.blocks <= 0 || shape.blocks >= int64_t(1) << 31 ||
      shape.shared_bytes > limits.shared_bytes) {
    throw std::runtime_error(std::string(name) + ": a device would refuse this launch");
  }
  order_accesses();
  Block block(name, shape, body);
  active = &block;
  set_stop([] { active->wait_for(Wait::kEnd); });
  block.run_all();
}

void leave_out(const char* file, int line) {
  left_out_file = file;
  left_out_line = line;
}

bool is_left_out(const char* file, int line) {
  if (line != left_out_line || left_out_file.empty()) return false;
  const char* slash = std::strrchr(file, '/');
  return left_out_file == (slash == nullptr ? file : slash + 1);
}

int thread_index() { return active->fiber().moment.thread; }
int64_t block_index() { return active->fiber().moment.block; }
const LaunchShape& shape() { return active->shape(); }
unsigned char* shared_memory() { return active->shared(); }
std::vector<PendingCopy>& pending_copies() { return active->fiber().copies; }
void sync_block() { active->wait_for(Wait::kBlock); }
void sync_warp() { active->wait_for(Wait::kSyncWarp); }

const unsigned char (*share(const void* value, std::size_t bytes))[kSlotBytes] {
  auto& slots = active->next_slots();
  std::memcpy(slots[thread_index() % kWarp], value, bytes);
  active->wait_for(Wait::kExchange);
  return slots;
}

void exchange(const void* value, std::size_t bytes, int source, void* result) {
  std::memcpy(result, share(value, bytes)[source], bytes);
}

unsigned ballot(bool predicate) {
  auto& slots = active->next_slots();
  slots[thread_index() % kWarp][0] = predicate;
  active->wait_for(Wait::kBallot);
  unsigned bits = 0;
  for (int lane = 0; lane < kWarp; ++lane) bits |= unsigned(slots[lane][0] != 0) << lane;
  return bits;
}

}  // namespace backmatch::emulator
