// A fiber: a stack and a saved stack pointer; the compiler keeps what else it needs around a switch. On processors
// other than x86-64 swapcontext does it, 20 times slower.
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

// Stands in the caller's code and leaves by a jump: calls and returns stay paired, so the return-stack predictor is
// right when the next fiber waited at the same place, as the lanes of a warp do. The first 128 bytes belong to the
// compiler.
[[gnu::always_inline]] inline void switch_context(Context* from, const Context* to) {
  asm volatile(
      "leaq -128(%%rsp), %%rsp\n\t"
      "pushq %%rbp\n\t"
      "leaq 1f(%%rip), %%rax\n\t"
      "pushq %%rax\n\t"
      "movq %%rsp, (%0)\n\t"
      "movq (%1), %%rsp\n\t"
      "popq %%rax\n\t"
      "jmp *%%rax\n"
      "1:\n\t"
      "popq %%rbp\n\t"
      "leaq 128(%%rsp), %%rsp"
      : "+D"(from), "+S"(to)
      :
      : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory", "cc", "xmm0",
        "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
        "xmm14", "xmm15");
}

inline const void* stack_pointer(const Context& context) { return context.stack_pointer; }

inline void make_context(Context* context, char* stack_bottom, size_t stack_bytes, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(stack_bottom + stack_bytes) & ~uintptr_t(15);
  void** frame = reinterpret_cast<void**>(top) - 2;  // above the entry address: the (absent) return address of entry
  frame[1] = nullptr;
  frame[0] = reinterpret_cast<void*>(entry);
  context->stack_pointer = frame;
}

#else

struct Context {
  ucontext_t state;
};

inline const void* stack_pointer(const Context& context) { return &context; }

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
