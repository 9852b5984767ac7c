// A fiber: a stack and a saved stack pointer. Switching stores the registers that a called function must keep on the
// old stack and loads them from the new one. On processors other than x86-64 swapcontext does it, 20 times slower.
#pragma once

#include <cstddef>
#include <cstdint>

#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace pyops::simt {

#ifdef __x86_64__

struct Context {
  void* stack_pointer = nullptr;
};

// Jumps instead of returning: the return-stack predictor is always wrong here, the indirect predictor mostly right.
asm(R"(
  .text
  .p2align 4
  .local pyops_simt_switch
  .type pyops_simt_switch, @function
pyops_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
  .size pyops_simt_switch, .-pyops_simt_switch
)");

extern "C" void pyops_simt_switch(Context* from, const Context* to);

inline void switch_context(Context* from, const Context* to) { pyops_simt_switch(from, to); }

inline void make_context(Context* context, char* stack_bottom, size_t stack_bytes, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack_bottom + stack_bytes) & ~uintptr_t(15);
  void** frame = reinterpret_cast<void**>(top) - 2;  // above the entry address: the (absent) return address of entry
  frame[1] = nullptr;
  frame[0] = reinterpret_cast<void*>(entry);
  context->stack_pointer = frame - 6;  // six registers, whatever they hold
}

#else

struct Context {
  ucontext_t state;
};

inline void switch_context(Context* from, const Context* to) { swapcontext(&from->state, &to->state); }

inline void make_context(Context* context, char* stack_bottom, size_t stack_bytes, void (*entry)()) {
  getcontext(&context->state);
  context->state.uc_stack.ss_sp = stack_bottom;
  context->state.uc_stack.ss_size = stack_bytes;
  context->state.uc_link = nullptr;
  makecontext(&context->state, entry, 0);
}

#endif

}  // namespace pyops::simt
