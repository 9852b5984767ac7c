// Faults of the hardware and of the language in a running fiber become fail(). The kernels are compiled with g++'s
// checks of array bounds, alignment and shifts; the checks call the functions below in place of a runtime library.
#include <signal.h>

#include <iterator>
#include <stdexcept>

#include "state.h"
#include "tsan.h"

namespace pyops::simt {
namespace {

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
struct sigaction previous[std::size(kSignals)];
stack_t previous_stack;

// A stack overflow leaves no room for the handler on the fiber's own stack.
alignas(16) char handler_stack[64 * 1024];

const char* access_kind([[maybe_unused]] const void* context) {
#ifdef __x86_64__
  constexpr greg_t kWriteBit = 2;  // of the page fault's error code
  const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext.gregs;
  return registers[REG_ERR] & kWriteBit ? "write" : "read";
#else
  return "access";
#endif
}

void restore() {
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &previous[i], nullptr);
}

void on_fault(int signal, siginfo_t* info, void* context) {
  if (executor.running == nullptr) return restore();  // not a kernel's: happens again, under the handler before
  if (signal == SIGFPE) fail("integer division by zero");
#ifdef __x86_64__
  if (info->si_code == SI_KERNEL) fail("invalid access at a non-canonical or misaligned address");
#endif
  std::string what = describe_address(info->si_addr, access_kind(context));
  if (executor.copying != nullptr) what += " by " + text(*executor.copying);
  fail(what);
}

}  // namespace

// fail() leaves the handler by switching to the host's stack, so the signal must not stay blocked (SA_NODEFER).
FaultHandler::FaultHandler() {
  if (kTsan) return;  // its runtime wants these signals for itself
  const stack_t stack{.ss_sp = handler_stack, .ss_flags = 0, .ss_size = sizeof handler_stack};
  sigaltstack(&stack, &previous_stack);
  struct sigaction action{};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &previous[i]);
}

FaultHandler::~FaultHandler() {
  if (kTsan) return;
  restore();
  sigaltstack(&previous_stack, nullptr);
}

namespace {

struct SourceLocation {
  const char* file;
  uint32_t line, column;
};

[[noreturn]] void undefined(const char* what, const void* data) {
  const auto* where = static_cast<const SourceLocation*>(data);  // every check's data begin with it
  const std::string text = std::string(what) + " at " + where->file + ":" + std::to_string(where->line);
  if (executor.running != nullptr) fail(text);
  throw std::runtime_error("simt: " + text);
}

}  // namespace
}  // namespace pyops::simt

extern "C" void __ubsan_handle_out_of_bounds_abort(void* data, void*) {
  pyops::simt::undefined("array index out of bounds", data);
}
extern "C" void __ubsan_handle_type_mismatch_v1_abort(void* data, void*) {
  pyops::simt::undefined("misaligned or null access", data);
}
extern "C" void __ubsan_handle_shift_out_of_bounds_abort(void* data, void*, void*) {
  pyops::simt::undefined("shift out of range", data);
}
