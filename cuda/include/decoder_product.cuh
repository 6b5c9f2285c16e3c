// One matrix product of the resident decoder: y = x W^T for ROWS rows of x, where every thread
// block owns an equal run of W's rows (to a pair) and its warps take turns at pieces of k.
//
// W comes through the warps' rings, asked for by producer warps long before x is known. x comes
// from the mailbox, each warp's own k alone. W fills the M side of mma.m16n8k16, x its N side;
// which k a lane passes is free so long as both agree, so it passes 8 that stand side by side. The
// warps' sums meet in shared memory and are added in a fixed order.
#pragma once
#include "decoder_shared.cuh"
#include "linear_finish.cuh"

constexpr int ceil_div(int x, int y) { return (x + y - 1) / y; }
constexpr int least(int x, int y) { return x < y ? x : y; }

// Outputs of the product, k, and rows of W in a slot. Gated: half of a slot is rows of the gate,
// the other half the same rows of the up projection.
template <int Outputs, int Depth, int SlotRows, bool Norm, bool Gated> struct Product {
  static constexpr int kGroupOutputs = SlotRows / (Gated ? 2 : 1);  // of a block's outputs
  static constexpr int kMostPairs = ceil_div(Outputs / 2, GRID);
  static constexpr int kGroups = ceil_div(2 * kMostPairs, kGroupOutputs);

  // A warp's steps along k, each of kChunks chunks of 64; a step of all warps is contiguous. A
  // slot is [chunk][row][64], its 16-byte pieces swizzled with row % 8.
  static constexpr int kMostChunks = SLOT_BYTES / (128 * SlotRows);
  static constexpr int kWarpChunks = ceil_div(Depth, 64 * WARPS);
  static constexpr int kSteps = ceil_div(kWarpChunks, kMostChunks);
  static constexpr int kChunks = ceil_div(kWarpChunks, kSteps);
  static constexpr int kColumns = 64 * kChunks;

  // x of as many steps as fit at a time.
  static constexpr int kStepsAtOnce = least(kSteps, X_BYTES / ROWS / (2 * kColumns));
  // The sums of all groups wait for one barrier where they fit.
  static constexpr bool kOneFlush = kGroups * SlotRows <= PARTIAL_ROWS;
  static constexpr int kTiles = ceil_div(SlotRows, 16);

  static_assert(Outputs % 2 == 0 && Outputs / 2 >= GRID, "every block must own a pair of outputs");
  static_assert(Depth % 64 == 0 && SlotRows % (Gated ? 16 : 8) == 0);
  static_assert(kMostChunks >= 1 && kStepsAtOnce >= 1 && SlotRows <= PARTIAL_ROWS);

  // This block's pairs of outputs.
  static __device__ __forceinline__ Tile share() { return share_of(Outputs / 2, GRID, blockIdx.x); }

  // ---- the producers' side ----

  static __device__ __forceinline__ void produce(Producer& producer, Shared& shared,
                                                 const SCALAR* w) {
    const Tile mine = share();
#pragma unroll 1
    for (int i = 0; i < kGroups * kSteps; ++i)
#pragma unroll
      for (int c = 0; c < kConsumersEach; ++c) {
        const int consumer = producer.first + c;
        Barriers& barriers = shared.barriers[consumer];
        barriers.acquire(producer.at[c]);
        copy_slot(shared_address(shared.slots[consumer][producer.at[c].index]), w, mine,
                  i / kSteps * kGroupOutputs, (i % kSteps * WARPS + consumer) * kColumns);
        barriers.commit(producer.at[c]);
        producer.pace();
      }
  }

  // The rows of a slot from the block's output `first` on, as far as the block owns them; zeros
  // behind the end of k.
  static __device__ __forceinline__ void copy_slot(u32 slot, const SCALAR* w, const Tile& mine,
                                                   int first, int first_column) {
    constexpr int pieces = kColumns / 8;  // of 16 bytes in a row
#pragma unroll
    for (int i = threadIdx.x % 32; i < SlotRows * pieces; i += 32) {
      const int row = i / pieces, piece = i % pieces;
      const bool up = Gated && row >= SlotRows / 2;
      const int output = first + row - (up ? SlotRows / 2 : 0);
      if (output >= 2 * mine.count) continue;
      const int column = first_column + piece * 8;
      const bool valid = column < Depth;
      const i64 from = static_cast<i64>(2 * mine.first + output + (up ? Outputs : 0)) * Depth;
      const int at = (piece / 8 * SlotRows + row) * 128 + ((piece ^ row) & 7) * 16;
      copy_async(slot + at, w + from + (valid ? column : 0), valid);
    }
  }

  // ---- the consumers' side ----

  // Brings this warp's k of kStepsAtOnce steps of x to shared memory, times `norm` if Norm, and
  // adds to the rows' sums of squares.
  static __device__ __forceinline__ void load_x(int warp, u8* to, const u64* x, u32 tag,
                                                const SCALAR* norm, int first,
                                                float (&squares)[ROWS]) {
    constexpr int units = kStepsAtOnce * kColumns / 4, turns = ceil_div(units, 32);
    constexpr int batch = least(ROWS * turns, 10);
    constexpr int even_steps = ceil_div(kSteps, kStepsAtOnce) * kStepsAtOnce;
    const int lane = threadIdx.x % 32;
    const auto column_of = [&](int turn) {
      const int unit = turn * 32 + lane;
      return ((first + unit / (kColumns / 4)) * WARPS + warp) * kColumns +
             unit % (kColumns / 4) * 4;
    };
    // Steps of all warps need not end where k does.
    const auto real = [&](int i) {
      const int turn = i % turns;
      return i < ROWS * turns && (units % 32 == 0 || turn * 32 + lane < units) &&
             (even_steps * WARPS * kColumns == Depth || column_of(turn) < Depth);
    };
#pragma unroll 1
    for (int base = 0; base < ROWS * turns; base += batch) {
      uint2 scale[batch];
      if constexpr (Norm) {
#pragma unroll
        for (int b = 0; b < batch; ++b)
          if (real(base + b))
            scale[b] = __ldg(reinterpret_cast<const uint2*>(norm + column_of((base + b) % turns)));
      }
      Two words[batch];
      receive(
          words, tag,
          [&](int b) {
            return x + (base + b) / turns * (Depth / 2) + column_of((base + b) % turns) / 2;
          },
          [&](int b) { return real(base + b); });
#pragma unroll
      for (int b = 0; b < batch; ++b) {
        const int row = (base + b) / turns, unit = (base + b) % turns * 32 + lane;
        if (row >= ROWS || unit >= units) continue;
        uint2 v = make_uint2(0, 0);
        if (real(base + b)) {
          v = words[b].data();
          if constexpr (Norm) {
            const float sum = sum_of_squares<SCALAR>(v);
            if constexpr (ROWS == 1)
              squares[0] += sum;
            else
#pragma unroll
              for (int r = 0; r < ROWS; ++r) squares[r] += r == row ? sum : 0.f;
            v = product<SCALAR>(v, scale[b]);
          }
        }
        *reinterpret_cast<uint2*>(to + row * kXPitch + unit * 8) = v;
      }
    }
    __syncwarp();
  }

  // Lane (g, t) passes row lane_row() of a tile for g: two rows whose pieces lie in the same banks
  // are then never read at once.
  static __device__ __forceinline__ int lane_row() {
    const int g = threadIdx.x % 32 / 4;
    return g >> 1 | (g & 1) << 2;
  }
  // Rows of a slot that are the low and the high half of a tile.
  static constexpr int low_row(int tile) { return Gated ? 8 * tile : 16 * tile; }
  static constexpr int high_row(int tile) {
    return Gated ? SlotRows / 2 + 8 * tile : 16 * tile + 8;
  }
  static constexpr bool has_high(int tile) { return Gated || 16 * tile + 8 < SlotRows; }

  // acc += the slot's rows of W times x of the same columns.
  static __device__ __forceinline__ void multiply(float (&acc)[2][kTiles][4], const u8* slot,
                                                  const u8* x) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, row = lane_row();
    const u8* const mine = slot + row * 128;
    const int swizzled = (t ^ row) * 16;
    const auto load = [](const u8* p) { return *reinterpret_cast<const uint4*>(p); };
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk)
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const u8* const from = mine + chunk * SlotRows * 128 + (swizzled ^ s * 64);
        uint4 column = make_uint4(0, 0, 0, 0);
        if (ROWS == 8 || g < ROWS) column = load(x + g * kXPitch + chunk * 128 + s * 64 + t * 16);
#pragma unroll
        for (int a = 0; a < kTiles; ++a) {
          const uint4 low = load(from + low_row(a) * 128);
          uint4 high = make_uint4(0, 0, 0, 0);
          if (has_high(a)) high = load(from + high_row(a) * 128);
          mma_16x8x16<SCALAR>(acc[0][a], {low.x, high.x, low.y, high.y}, {column.x, column.y});
          mma_16x8x16<SCALAR>(acc[1][a], {low.z, high.z, low.w, high.w}, {column.z, column.w});
        }
      }
  }

  // All of the product: finish(row of x, pair, y, up) is told the outputs 2 * pair and 2 * pair + 1
  // of this block (and those of the up projection, if Gated), by one thread each.
  template <typename Finish>
  static __device__ __forceinline__ void consume(Consumer& consumer, Shared& shared, const u64* x,
                                                 u32 tag, const SCALAR* norm, float eps,
                                                 const Finish& finish) {
    const int lane = threadIdx.x % 32, t = lane % 4, warp = consumer.warp;
    const int count = share().count;
    u8* const own_x = shared.x[warp];
    float squares[ROWS] = {};
#pragma unroll 1
    for (int group = 0; group < kGroups; ++group) {
      float acc[2][kTiles][4] = {};
#pragma unroll 1
      for (int step = 0; step < kSteps; ++step) {
        const bool all_at_once = kStepsAtOnce == kSteps;
        if (all_at_once ? group == 0 && step == 0 : step % kStepsAtOnce == 0)
          load_x(warp, own_x, x, tag, norm, step, squares);
        shared.barriers[warp].wait(consumer.at);
        multiply(acc, shared.slots[warp][consumer.at.index],
                 own_x + step % kStepsAtOnce * (2 * kColumns));
        shared.barriers[warp].release(consumer.at);
      }
      // A group that fetches x once more adds its squares once more, too.
      if (Norm && group == 0) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          const float sum = warp_sum(squares[r]);
          if (lane == 0) shared.squares[consumer.parity][r][warp] = sum;
        }
      }
      const int before = kOneFlush ? group * SlotRows : 0;
#pragma unroll
      for (int a = 0; a < kTiles; ++a)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const int row_of_x = 2 * t + c % 2;
          const int row = before + (c < 2 ? low_row(a) : high_row(a)) + lane_row();
          if (row_of_x < ROWS && (c < 2 || has_high(a)))
            shared.partials[consumer.buffer][warp][row_of_x][row] = acc[0][a][c] + acc[1][a][c];
        }
      if (kOneFlush && group + 1 < kGroups) continue;
      sync_consumers();
      const int first = kOneFlush ? 0 : group * (kGroupOutputs / 2);
      const int pairs = kOneFlush ? count : min(count - first, kGroupOutputs / 2);
#pragma unroll 1
      for (int j = threadIdx.x; j < ROWS * pairs; j += WARPS * 32) {
        const int r = j % ROWS, output = j / ROWS * 2;
        const int row = output / kGroupOutputs * SlotRows + output % kGroupOutputs;
        float2 y = shared.total(consumer.buffer, r, row), up = {};
        if constexpr (Gated) up = shared.total(consumer.buffer, r, row + SlotRows / 2);
        if constexpr (Norm) {
          float sum = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) sum += shared.squares[consumer.parity][r][w];
          const float scale = rsqrtf(sum / Depth + eps);
          y.x *= scale, y.y *= scale, up.x *= scale, up.y *= scale;
        }
        finish(r, first + output / 2, y, up);
      }
      consumer.buffer ^= 1;
    }
    consumer.parity ^= 1;
  }
};
