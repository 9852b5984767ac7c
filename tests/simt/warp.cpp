// Exchanges between the lanes of a warp. A lane waits until every lane named in its mask waits in the same exchange;
// the last to come computes the results of all (those of matrix instructions in matrix.cpp). A shuffle that reads a
// lane outside the mask gets poison.
#include <bit>

#include "state.h"
#include "tsan.h"

namespace pyops::simt {
namespace {

constexpr uint64_t kPoison = ~uint64_t(0);

std::string hex(unsigned mask) {
  char buffer[16];
  snprintf(buffer, sizeof buffer, "0x%08x", mask);
  return buffer;
}

unsigned source_lane(const Fiber& lane) {
  const int width = lane.width, self = int(lane.lane), first = self & ~(width - 1), last = first + width - 1;
  switch (lane.shuffle) {
    case Shuffle::kIndex:
      return first + (lane.operand & (width - 1));
    case Shuffle::kDown:
      return self + lane.operand <= last ? self + lane.operand : self;
    case Shuffle::kXor:
      return (self ^ lane.operand) <= last ? self ^ lane.operand : self;
  }
  __builtin_unreachable();
}

void complete(Warp& warp, unsigned mask, Wait kind) {
  if (kind >= Wait::kLdmatrix) complete_matrices(warp, kind);
  unsigned votes = 0;
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    const unsigned lane = std::countr_zero(rest);
    if (kind == Wait::kBallot && warp.lanes[lane].value != 0) votes |= 1u << lane;
  }
  for (unsigned rest = mask; rest != 0; rest &= rest - 1) {
    Fiber& lane = warp.lanes[std::countr_zero(rest)];
    lane.result = votes;
    if (kind == Wait::kShuffle) {
      const unsigned source = source_lane(lane);
      lane.result = mask >> source & 1 ? warp.lanes[source].value : kPoison;
    }
    make_ready(&lane);
  }
  warp.waiting &= ~mask;
  make_progress();
  let_copies_happen();
}

}  // namespace

// The operands of the exchange stand in the running fiber or, of matrix instructions, in its warp.
void join(Wait kind, unsigned mask, CallSite site) {
  Fiber* me = executor.running;
  Warp& warp = *me->warp;
  if ((mask >> me->lane & 1) == 0) fail("lane is not in its own mask " + hex(mask), site);
  if (warp.count < kWarpLanes && mask >> warp.count != 0) fail("mask " + hex(mask) + " names absent lanes", site);
  me->wait = kind;
  me->site = site;
  me->mask = mask;
  if (warp.waiting == 0) {
    warp.wait = kind;
    warp.differ = false;
    warp.mask = mask;
    warp.site = site;
  } else if (warp.wait != kind || warp.mask != mask || !same_site(warp.site, site)) {
    warp.differ = true;
  }
  warp.waiting |= 1u << me->lane;
  if ((warp.waiting & mask) == mask) {
    for (unsigned rest = warp.differ ? mask : 0; rest != 0; rest &= rest - 1) {
      const Fiber& lane = warp.lanes[std::countr_zero(rest)];
      if (lane.wait != kind || lane.mask != mask || !same_site(lane.site, site)) {
        fail("divergence: another lane named in mask " + hex(mask) + " waits with mask " + hex(lane.mask) + " at " +
                 text(lane.site),
             site);
      }
    }
    complete(warp, mask, kind);
  }
  wait_for_turn();
  me->wait = Wait::kNone;
}

void sync_warp(unsigned mask, CallSite site) {
  if (switched_off(site, Wait::kSyncWarp)) return;
  Fiber* me = executor.running;
  char* order = &me->warp->tsan_sync[me->warp_syncs++ % 2][std::countr_zero(mask)];
  tsan_release(order);
  join(Wait::kSyncWarp, mask, site);
  tsan_acquire(order);
}

unsigned ballot(bool v, unsigned mask, CallSite site) {
  Fiber* me = executor.running;
  if (switched_off(site, Wait::kBallot)) return unsigned(v) << me->lane;
  me->value = v;
  join(Wait::kBallot, mask, site);
  return unsigned(me->result);
}

uint64_t exchange(Shuffle kind, uint64_t bits, int operand, int width, unsigned mask, CallSite site) {
  if (switched_off(site, Wait::kShuffle)) return bits;
  Fiber* me = executor.running;
  if (width <= 0 || width > int(kWarpLanes) || (width & (width - 1)) != 0) {
    fail("shuffle of width " + std::to_string(width), site);
  }
  me->value = bits;
  me->shuffle = kind;
  me->operand = operand;
  me->width = width;
  join(Wait::kShuffle, mask, site);
  return me->result;
}

}  // namespace pyops::simt
