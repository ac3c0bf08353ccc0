// One step of up to 64 tokens on a CPU: tokens in, logits out, the new keys and values written to the cache. The
// tokens belong to any rows of the cache: one of each, or several that follow each other.
//
// At batch 1 a token is one pass over all weights, and only the memory's speed counts. So weights are read once,
// in order and where they lie, in the form in which they are stored (float, bf16, half, or int8 with a scale per
// row), and everything between them and the cache is float. With more tokens each weight that is read is used
// for all of them. The order of every sum is the same for all numbers of tokens and threads: the same token gives
// the same bits alone and in any company.
//
// A step is a sequence of phases: of each layer qkv, attention, o, gate and up, down; then the head.
// A phase is cut into pieces. Every thread has a run of neighbouring pieces, so that it reads memory in order, and
// who is done with its own helps the others. Whoever finishes the last piece does what is too small to share (norm,
// rotation) and opens the next phase; the others meanwhile ask for the weights that they will read then. A thread
// that the system has put aside holds nobody up, unless it holds a piece. No thread waits spinning for longer than
// it takes to be woken.
//
// Called through ctypes by compiled.py, which declares the same structures. No headers of torch, so that the
// library depends on neither its version nor Python's.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// vectors

#if defined(__AVX512F__)
constexpr int WIDTH = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int WIDTH = 8, REGISTERS = 16;
#else
constexpr int WIDTH = 4, REGISTERS = 32;  // NEON
#endif
constexpr int MAX_TOKENS = 64;
constexpr int GROUP = 16;   // query heads of a key head that are computed together
constexpr int BLOCK = 24;   // weight rows whose products are finished together
constexpr int SPLIT = 144;  // keys of a piece of attention
constexpr int AHEAD = 8192; // bytes that weights are asked for in advance: no prefetcher follows many rows at once

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Shorts __attribute__((vector_size(WIDTH * 2)));
typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
typedef _Float16 half;
typedef half Halves __attribute__((vector_size(WIDTH * 2)));
struct bf16 { uint16_t bits; };

template <class Vector> inline Vector read(const void* from) {
    Vector vector;
    memcpy(&vector, from, sizeof vector);
    return vector;
}
inline void store(float* to, Floats x) { memcpy(to, &x, sizeof x); }
inline Floats load(const float* from) { return read<Floats>(from); }
// As intrinsics, because GCC turns the portable forms into many instructions.
#if defined(__AVX512F__)
inline Floats load(const bf16* from) {
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(read<__m256i>(from)), 16);
}
inline Floats load(const int8_t* from) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(read<__m128i>(from))); }
inline Floats load(const half* from) { return _mm512_cvtph_ps(read<__m256i>(from)); }
#elif defined(__AVX2__)
inline Floats load(const bf16* from) {
    return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(read<__m128i>(from)), 16);
}
inline Floats load(const int8_t* from) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
}
inline Floats load(const half* from) { return _mm256_cvtph_ps(read<__m128i>(from)); }
#else
inline Floats load(const bf16* from) { return (Floats)(__builtin_convertvector(read<Shorts>(from), Words) << 16); }
inline Floats load(const int8_t* from) {
    return __builtin_convertvector(__builtin_convertvector(read<Bytes>(from), Ints), Floats);
}
inline Floats load(const half* from) { return __builtin_convertvector(read<Halves>(from), Floats); }
#endif
inline float single(float x) { return x; }
inline float single(int8_t x) { return x; }
inline float single(bf16 x) { uint32_t word = uint32_t(x.bits) << 16; float y; memcpy(&y, &word, 4); return y; }
inline void round_to(float& to, float x) { to = x; }
inline void round_to(bf16& to, float x) {  // to nearest, ties to even
    uint32_t word;
    memcpy(&word, &x, 4);
    to.bits = x != x ? 0x7fc0 : uint16_t((word + 0x7fff + ((word >> 16) & 1)) >> 16);
}
inline float single(half x) { return float(x); }
inline void round_to(half& to, float x) { to = half(x); }

// Of all lanes, by halves; of four vectors at once, in the same order, with half of the instructions. In registers: a
// way through memory would cost more than a product of 64 terms.
typedef float Four __attribute__((vector_size(16)));
inline Four quarter(Floats x) {
#if defined(__AVX512F__)
    const auto y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7)
                 + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const auto y = x;
#endif
#if defined(__AVX2__)
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
#else
    return y;
#endif
}
inline float sum(Floats x) {
    const Four four = quarter(x);
    return (four[0] + four[2]) + (four[1] + four[3]);
}
inline Four sum(Floats x0, Floats x1, Floats x2, Floats x3) {
    const auto pairs = [](Four x, Four y) {
        return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
    };
    const Four first = pairs(quarter(x0), quarter(x1)), second = pairs(quarter(x2), quarter(x3));
    return __builtin_shufflevector(first, second, 0, 2, 4, 6) + __builtin_shufflevector(first, second, 1, 3, 5, 7);
}
inline Floats larger(Floats x, Floats y) { return x < y ? y : x; }

// e^x to two units in the last place, by Cody and Waite's reduction and a polynomial; 0 and inf become 1e-38 and 1e38
inline Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    Floats n = x * 1.44269504f + 12582912.0f;  // rounds: 1.5 * 2^23
    const Ints exponent = (Ints)n << 23;
    n -= 12582912.0f;
    const Floats r = x - n * 0.693145752f - n * 1.42860677e-6f;
    Floats p = r * 1.98756912e-4f + 1.39819995e-3f;
    p = p * r + 8.33345205e-3f;
    p = p * r + 4.16657962e-2f;
    p = p * r + 1.66666657e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    return (Floats)((Ints)p + exponent);
}

// products; what is left of a row beside whole vectors is multiplied by fma, so that it rounds alike in every dtype

// out[m][r] = row r of the matrix times row m of x, for R rows at once and M rows of x
template <class T, int R, int M>
[[gnu::noinline]] void tile(const T* matrix, int64_t stride, const float* x, int64_t width, float* out) {
    Floats sums[R][M];
    for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) sums[r][m] = Floats{};
    int64_t k = 0;
    for (; k + WIDTH <= width; k += WIDTH) {
        constexpr int BYTES = R * WIDTH * int(sizeof(T)), EVERY = std::max(1, 64 / BYTES);
        if (k / WIDTH % EVERY == 0)
            for (int at = 0; at < BYTES; at += 64)
                __builtin_prefetch((const char*)(matrix + R * k) + AHEAD + at);
        Floats columns[M];
        for (int m = 0; m < M; ++m) columns[m] = load(x + m * width + k);
        for (int r = 0; r < R; ++r) {
            const Floats weights = load(matrix + r * stride + k);
            for (int m = 0; m < M; ++m) sums[r][m] += weights * columns[m];
        }
    }
    if constexpr (M == 4)
        for (int r = 0; r < R; ++r) {
            const Four four = sum(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
            for (int m = 0; m < M; ++m) out[m * BLOCK + r] = four[m];
        }
    else
        for (int m = 0; m < M; ++m) {
            int r = 0;
            for (; r + 4 <= R; r += 4) {
                const Four four = sum(sums[r][m], sums[r + 1][m], sums[r + 2][m], sums[r + 3][m]);
                memcpy(out + m * BLOCK + r, &four, sizeof four);
            }
            for (; r < R; ++r) out[m * BLOCK + r] = sum(sums[r][m]);
        }
    for (; k < width; ++k)
        for (int r = 0; r < R; ++r)
            for (int m = 0; m < M; ++m) {
                float& y = out[m * BLOCK + r];
                y = std::fma(single(matrix[r * stride + k]), x[m * width + k], y);
            }
}

template <class T, int M>
void tiles(const T* matrix, int64_t stride, int count, const float* x, int64_t width, float* out) {
    // As many as the registers hold; each divides BLOCK. For one row of x few are enough: with four of int8 every
    // product waits for the one before it, and with six of bf16 the memory is no faster (Zen 3).
    constexpr int ONE = REGISTERS == 16 && sizeof(T) == 1 ? 6 : 4;
    constexpr int R = M == 1 ? ONE : REGISTERS == 32 ? (M == 4 ? 6 : 8) : (M == 4 ? 3 : 4);
    int r = 0;
    for (; r + R <= count; r += R) tile<T, R, M>(matrix + r * stride, stride, x, width, out + r);
    for (; r < count; ++r) tile<T, 1, M>(matrix + r * stride, stride, x, width, out + r);
}

// out [rows, BLOCK]: `count` rows of a matrix times `rows` rows of x
template <class T>
void block(const T* matrix, int64_t stride, int count, const float* x, int64_t width, int rows, float* out) {
    int m = 0;
    for (; m + 4 <= rows; m += 4) tiles<T, 4>(matrix, stride, count, x + m * width, width, out + m * BLOCK);
    const float* last = x + m * width;
    if (rows - m == 3) tiles<T, 3>(matrix, stride, count, last, width, out + m * BLOCK);
    if (rows - m == 2) tiles<T, 2>(matrix, stride, count, last, width, out + m * BLOCK);
    if (rows - m == 1) tiles<T, 1>(matrix, stride, count, last, width, out + m * BLOCK);
}

}  // namespace

// what compiled.py fills in

extern "C" {

enum Kind : int64_t { FP32, BF16, FP16, INT8 };

struct Matrix { const void* values; const float* scales; };  // scales: of every row, for INT8
struct Layer { const float* input_norm; Matrix qkv, o; const float* post_norm; Matrix gate_up, down; };
struct Model {
    int64_t layers, hidden, intermediate, heads, key_heads, head_dim, vocab;
    int64_t matrices, dtype;  // Kinds: of the matrices, and of embedding and cache
    double eps;
    const float *cos, *sin;  // [positions, head_dim / 2]
    const void* embedding;
    const float* norm;
    Matrix head;
    const Layer* layer;
};
struct Step {
    int64_t count, batch, capacity;          // tokens of this step; rows of the cache, and tokens of each
    const int64_t *tokens, *rows, *positions;  // [count]: a token, and where in the cache it goes
    int64_t outputs;
    const int64_t* output;                   // [outputs]: of which tokens the logits are wanted, in order
    void *keys, *values;                     // [layers, batch, capacity, key heads, head dim]
    int64_t layer_stride, row_stride;        // of the cache, in elements
    float* logits;                           // [outputs, vocab]
    int64_t threads;
};
}

namespace {

enum Phase { QKV, ATTENTION, OUT, GATE_UP, DOWN, HEAD };

// Tells a spinning core that it waits.
inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Decoder {
  public:
    int run(const Model& model, const Step& step) {
        std::lock_guard<std::mutex> guard(one_at_a_time);
        this->model = &model, this->step = &step;
        if (step.count < 1 || step.count > MAX_TOKENS || step.outputs < 0 || step.outputs > step.count) return 1;
        const int64_t group_rows = rows = int(step.count), heads = model.heads + 2 * model.key_heads;
        longest = 0;
        for (int row = 0; row < rows; ++row) {
            const int64_t token = step.tokens[row], at = step.positions[row], in = step.rows[row];
            if (token < 0 || token >= model.vocab || at < 0 || at >= step.capacity) return 1;
            if (in < 0 || in >= step.batch) return 1;
            longest = std::max(longest, at + 1);
        }
        for (int64_t at = 0; at < step.outputs; ++at)  // in order: their rows move up in place
            if (step.output[at] < at || step.output[at] >= step.count) return 1;
        splits = int((longest + SPLIT - 1) / SPLIT);
        const int wanted = int(std::clamp<int64_t>(step.threads, 1, MAX_THREADS));
        // as many tokens of a row share a piece of attention as leave four pieces for each thread
        const int64_t together = std::max<int64_t>(1, rows * model.key_heads * splits / (4 * wanted));
        spans.clear();
        for (int row = 0; row < rows; ++row)
            if (!row || step.rows[row] != step.rows[row - 1] || row - spans.back() == together) spans.push_back(row);
        spans.push_back(rows);
        // a thread of an earlier step with more of them may still take a piece
        floats.resize(std::max(wanted, started + 1) * 2 * SPLIT * model.head_dim);
        x.resize(group_rows * model.hidden), normed.resize(group_rows * model.hidden);
        projected.resize(group_rows * heads * model.head_dim);
        queries.resize(group_rows * model.heads * model.head_dim);
        mixed.resize(group_rows * model.heads * model.head_dim);
        gated.resize(group_rows * model.intermediate);
        parts.resize(group_rows * model.heads * splits * (model.head_dim + 2));
        try {
            for (; started + 1 < wanted; ++started)
                std::thread([this, index = started + 1] { serve(index); }).detach();
        } catch (const std::system_error&) {  // there are no more threads: those that there are do all pieces
        }
        threads.store(wanted, std::memory_order_relaxed);

        by_dtype([&](auto kind) {
            using T = decltype(kind);
            for (int row = 0; row < rows; ++row)
                for (int64_t k = 0; k < model.hidden; ++k)
                    x[row * model.hidden + k] = single(((const T*)model.embedding)[step.tokens[row] * model.hidden + k]);
        });
        layer = 0;
        norm(model.layer[0].input_norm);
        open(QKV);
        work(0);
        return 0;
    }

  private:
    // the threads

    struct Stream { const char* from[2]; int64_t size; };

    void serve(int index) {
        for (;;) {
            if (index < threads.load(std::memory_order_relaxed)) work(index);
            else wait(now(), {});
        }
    }

    // A ticket: generation << 48 | the end of a thread's run of pieces << 24 | its next piece.
    static int64_t piece_of(uint64_t ticket) { return ticket & 0xffffff; }
    static int64_t end_of(uint64_t ticket) { return ticket >> 24 & 0xffffff; }
    static bool has_piece(uint64_t ticket) { return piece_of(ticket) < end_of(ticket); }
    uint16_t now() const { return uint16_t(generation.load(std::memory_order_acquire)); }

    // Takes pieces until the step is over (thread 0, the caller's), or until there are none.
    void work(int index) {
        Stream next = {};
        for (;;) {
            const uint16_t seen = now();
            const int others = threads.load(std::memory_order_relaxed);
            bool found = false, published = true;
            for (int turn = 0; turn < others && !found; ++turn) {
                std::atomic<uint64_t>& claim = claims[(index + turn) % others].ticket;
                uint32_t taken = 0, all = 0;
                uint64_t ticket = claim.load(std::memory_order_acquire);
                // counts on only while there are pieces: who spins would else count into the bits above them
                for (; has_piece(ticket); ticket = claim.load(std::memory_order_acquire)) {
                    ticket = claim.fetch_add(1, std::memory_order_acq_rel);
                    if (!has_piece(ticket)) break;
                    if (!taken++) all = pieces, next = following(index);
                    compute(piece_of(ticket), index);
                }
                if (index == 0 && turn == 0 && !taken && end_of(ticket) == 0) return;
                published &= ticket >> 48 == seen;
                found = taken;
                if (taken && done.fetch_add(taken, std::memory_order_acq_rel) + taken == all) finish();
            }
            if (found || !published) continue;
            wait(seen, next);
            if (index) return;
            next = {};
        }
    }

    // Until another phase is open. The time goes into the weights of this thread's next run.
    void wait(uint16_t seen, Stream next) {
        using clock = std::chrono::steady_clock;
        for (int64_t at = 0; at < next.size && now() == seen; at += 1024)
            for (int64_t line = at; line < at + 1024; line += 64)
                for (const char* from : next.from)
                    if (from) __builtin_prefetch(from + line, 0, 2);
        const auto end = clock::now() + std::chrono::microseconds(SPIN);
        do {
            for (int turn = 0; turn < 32; ++turn) {
                if (now() != seen) return;
                pause();
            }
        } while (clock::now() < end);
        const uint32_t last = generation.load(std::memory_order_acquire);
        if (uint16_t(last) == seen) generation.wait(last, std::memory_order_acquire);
    }

    // A phase of so many pieces, or with 0 the end of the step. The first run comes last and is never empty:
    // once it can be taken, other threads may finish the phase, publish what follows, and even return to the
    // caller, before this one goes on.
    void publish(int64_t count) {
        const uint32_t next = generation.load(std::memory_order_relaxed) + 1;
        const int all = threads.load(std::memory_order_relaxed);
        pieces = uint32_t(count);
        done.store(0, std::memory_order_relaxed);
        generation.store(next, std::memory_order_release);
        for (int index = all; index--;) {
            const uint64_t run = uint64_t(share(count, index + 1, all)) << 24 | uint64_t(share(count, index, all));
            claims[index].ticket.store(uint64_t(next) << 48 | run, std::memory_order_release);
        }
        // notify_all first looks whether anyone sleeps. That look may overtake the stores above, on x86 too, and a
        // thread that has just seen the old generation would sleep on.
        std::atomic_thread_fence(std::memory_order_seq_cst);
        generation.notify_all();
    }

    // Where the run of a thread begins.
    static int64_t share(int64_t count, int index, int all) { return (count * index + all - 1) / all; }

    // the phases

    struct Product { Matrix matrix; int64_t height, width; const float* in; };

    Product product(Phase phase, int64_t layer) const {
        const Model& m = *model;
        const Layer& l = m.layer[std::min(layer, m.layers - 1)];
        const int64_t mixture = m.heads * m.head_dim;
        switch (phase) {
            case QKV: return {l.qkv, mixture + 2 * m.key_heads * m.head_dim, m.hidden, normed.data()};
            case OUT: return {l.o, m.hidden, mixture, mixed.data()};
            case GATE_UP: return {l.gate_up, m.intermediate, m.hidden, normed.data()};
            case DOWN: return {l.down, m.hidden, m.intermediate, gated.data()};
            default: return {m.head, m.vocab, m.hidden, normed.data()};
        }
    }

    void open(Phase next) {
        phase = next;
        if (phase == ATTENTION) return publish(int64_t(spans.size() - 1) * model->key_heads * splits);
        publish((product(phase, layer).height + BLOCK - 1) / BLOCK);
    }

    void compute(int64_t piece, int index) {
        if (phase == ATTENTION) return by_dtype([&](auto kind) { attend<decltype(kind)>(piece, index); });
        switch (model->matrices) {
            case FP32: return multiply<float>(piece);
            case BF16: return multiply<bf16>(piece);
            case INT8: return multiply<int8_t>(piece);
            case FP16: return multiply<half>(piece);
        }
    }

    // What a thread reads first in the next phase with weights.
    Stream following(int index) const {
        constexpr int64_t SIZES[] = {4, 2, 2, 1};  // of the Kinds
        const bool last = layer + 1 == model->layers;
        const Phase next = phase <= ATTENTION ? OUT : phase == OUT ? GATE_UP : phase == GATE_UP ? DOWN
                         : phase == DOWN && last ? HEAD : QKV;
        const Product p = product(next, phase == HEAD ? 0 : layer + (next == QKV));
        const int64_t row = p.width * SIZES[model->matrices], all = threads.load(std::memory_order_relaxed);
        const int64_t blocks = (p.height + BLOCK - 1) / BLOCK, first = share(blocks, index, int(all)) * BLOCK;
        const char* from = (const char*)p.matrix.values + first * row;
        const int64_t size = std::min<int64_t>(WARM, (p.height - first) * row);
        return {{from, next == GATE_UP ? from + p.height * row : nullptr}, size};
    }

    void finish() {
        const Model& m = *model;
        switch (phase) {
            case QKV: by_dtype([&](auto kind) { rotate<decltype(kind)>(); }); return open(ATTENTION);
            case ATTENTION: combine(); return open(OUT);
            case OUT: norm(m.layer[layer].post_norm); return open(GATE_UP);
            case GATE_UP: return open(DOWN);
            case DOWN:
                ++layer;
                if (layer < m.layers) {
                    norm(m.layer[layer].input_norm);
                    return open(QKV);
                }
                rows = int(step->outputs);
                if (!rows) return publish(0);
                for (int64_t at = 0; at < rows; ++at)
                    if (step->output[at] != at)
                        memcpy(&x[at * m.hidden], &x[step->output[at] * m.hidden], size_t(m.hidden) * 4);
                norm(m.norm);
                return open(HEAD);
            case HEAD: return publish(0);
        }
    }

    template <class F> void by_dtype(F f) {
        if (model->dtype == FP32) f(float());
        if (model->dtype == BF16) f(bf16());
        if (model->dtype == FP16) f(half());
    }

    int64_t position(int row) const { return step->positions[row]; }

    // BLOCK rows of the matrix of this phase times what goes into it.
    template <class T> void multiply(int64_t piece) {
        const auto [matrix, height, width, in] = product(phase, layer);
        const int64_t n = piece * BLOCK;
        const int size = int(std::min<int64_t>(BLOCK, height - n));
        const T* values = (const T*)matrix.values;
        float out[MAX_TOKENS * BLOCK], up[MAX_TOKENS * BLOCK];
        const auto take = [&](int64_t row, float* to) {
            block(values + row * width, width, size, in, width, rows, to);
            if (!matrix.scales) return;
            for (int at = 0; at < rows; ++at)
                for (int r = 0; r < size; ++r) to[at * BLOCK + r] *= matrix.scales[row + r];
        };
        take(n, out);
        if (phase == GATE_UP) {
            take(n + height, up);
            for (int r = 0; r < rows * BLOCK; r += WIDTH) {
                const Floats gate = load(out + r);
                store(out + r, gate / (exponential(-gate) + 1.0f) * load(up + r));
            }
        }
        float* to = phase == QKV ? projected.data() : phase == GATE_UP ? gated.data()
                  : phase == HEAD ? step->logits : x.data();
        for (int at = 0; at < rows; ++at)
            for (int r = 0; r < size; ++r) {
                float& y = to[at * height + n + r];
                y = phase == OUT || phase == DOWN ? y + out[at * BLOCK + r] : out[at * BLOCK + r];
            }
    }

    void norm(const float* weight) {
        const int64_t width = model->hidden;
        for (int row = 0; row < rows; ++row) {
            const float* in = x.data() + row * width;
            float* out = normed.data() + row * width;
            Floats squares = {};
            int64_t k = 0;
            for (; k + WIDTH <= width; k += WIDTH) squares += load(in + k) * load(in + k);
            float total = sum(squares);
            for (; k < width; ++k) total += in[k] * in[k];
            const float factor = 1.0f / std::sqrt(total / float(width) + float(model->eps));
            for (k = 0; k < width; ++k) out[k] = in[k] * factor * weight[k];
        }
    }

    // Turns queries and keys to their positions, and writes keys and values to the cache.
    template <class T> void rotate() {
        const Model& m = *model;
        const int64_t dim = m.head_dim, half = dim / 2, heads = m.heads + 2 * m.key_heads;
        const float scale = 1.0f / std::sqrt(float(dim));
        for (int row = 0; row < rows; ++row) {
            const float *cos = m.cos + position(row) * half, *sin = m.sin + position(row) * half;
            const int64_t at = layer * step->layer_stride + step->rows[row] * step->row_stride
                             + position(row) * m.key_heads * dim;
            for (int64_t head = 0; head < heads; ++head) {
                float* in = projected.data() + (row * heads + head) * dim;
                if (head < m.heads + m.key_heads)
                    for (int64_t k = 0; k < half; ++k) {
                        const float first = in[k], second = in[k + half];
                        in[k] = first * cos[k] - second * sin[k];
                        in[k + half] = second * cos[k] + first * sin[k];
                    }
                if (head < m.heads)
                    for (int64_t k = 0; k < dim; ++k) queries[(row * m.heads + head) * dim + k] = in[k] * scale;
                else {
                    const bool key = head < m.heads + m.key_heads;
                    T* to = (T*)(key ? step->keys : step->values) + at
                          + (head - m.heads - (key ? 0 : m.key_heads)) * dim;
                    for (int64_t k = 0; k < dim; ++k) round_to(to[k], in[k]);
                }
            }
        }
    }

    // SPLIT keys of one row and key head, for the tokens of a span. If they are several, the keys and values become
    // floats once for all of them, in the memory of thread `index`.
    template <class T> void attend(int64_t piece, int index) {
        const Model& m = *model;
        const int64_t dim = m.head_dim, stride = m.key_heads * dim, all = int64_t(spans.size()) - 1;
        const int64_t span = piece % all, split = piece / all % splits, key_head = piece / all / splits;
        const int begin = spans[span], end = spans[span + 1];
        int64_t last = 0;
        for (int row = begin; row < end; ++row) last = std::max(last, position(row));
        const int64_t first = split * SPLIT, count = std::min<int64_t>(SPLIT, last + 1 - first);
        if (count <= 0) return;
        const int64_t at = layer * step->layer_stride + step->rows[begin] * step->row_stride + first * stride + key_head * dim;
        const T *keys = (const T*)step->keys + at, *values = (const T*)step->values + at;
        if (end - begin == 1) return attend_token(begin, key_head, split, keys, values, stride);
        float *wide_keys = floats.data() + index * 2 * SPLIT * dim, *wide_values = wide_keys + SPLIT * dim;
        for (int64_t j = 0; j < count; ++j) {
            widen(keys + j * stride, wide_keys + j * dim, dim);
            widen(values + j * stride, wide_values + j * dim, dim);
        }
        for (int row = begin; row < end; ++row)
            attend_token<float>(row, key_head, split, wide_keys, wide_values, dim);
    }

    template <class T> static void widen(const T* from, float* to, int64_t size) {
        int64_t k = 0;
        for (; k + WIDTH <= size; k += WIDTH) store(to + k, load(from + k));
        for (; k < size; ++k) to[k] = single(from[k]);
    }

    // The maximum, sum and mixture of the values, of every query head of the group of one token.
    template <class T>
    void attend_token(int row, int64_t key_head, int64_t split, const T* keys, const T* values, int64_t stride) {
        const Model& m = *model;
        const int64_t dim = m.head_dim, group = m.heads / m.key_heads;
        const int64_t count = std::min<int64_t>(SPLIT, position(row) + 1 - split * SPLIT);
        if (count <= 0) return;
        float scores[GROUP][SPLIT], out[GROUP * BLOCK];
        for (int64_t begin = 0; begin < group; begin += GROUP) {
            const int size = int(std::min<int64_t>(GROUP, group - begin));
            const int64_t head = key_head * group + begin;
            for (int64_t j = 0; j < count; j += BLOCK) {
                // no prefetcher follows the strides of a cache with several key heads
                for (int64_t next = j; stride > dim && next < std::min(count, j + BLOCK); ++next)
                    for (int64_t line = 0; line < dim; line += 64 / int64_t(sizeof(T))) {
                        __builtin_prefetch(values + next * stride + line);
                        __builtin_prefetch(keys + (next + BLOCK) * stride + line);
                    }
                block(keys + j * stride, stride, int(std::min<int64_t>(BLOCK, count - j)),
                      queries.data() + (row * m.heads + head) * dim, dim, size, out);
                for (int g = 0; g < size; ++g) memcpy(scores[g] + j, out + g * BLOCK, BLOCK * 4);
            }
            float* to = parts.data() + ((row * m.heads + head) * splits + split) * (dim + 2);
            const int64_t apart = splits * (dim + 2);  // of two heads
            for (int g = 0; g < size; ++g) {
                const Floats none = Floats{} - std::numeric_limits<float>::infinity();
                float* s = scores[g];
                std::fill(s + count, s + (count + WIDTH - 1) / WIDTH * WIDTH, none[0]);
                Floats highest = none, total = {};
                for (int64_t j = 0; j < count; j += WIDTH) highest = larger(highest, load(s + j));
                float most = highest[0];
                for (int lane = 1; lane < WIDTH; ++lane) most = std::max(most, highest[lane]);
                for (int64_t j = 0; j < count; j += WIDTH) {
                    const Floats weights = exponential(load(s + j) - most);
                    store(s + j, weights), total += weights;
                }
                to[g * apart] = most, to[g * apart + 1] = sum(total);
            }
            int g = 0;
            for (; g + 3 <= size; g += 3) mix<T, 3>(values, stride, scores + g, count, to + g * apart + 2, apart);
            for (; g < size; ++g) mix<T, 1>(values, stride, scores + g, count, to + g * apart + 2, apart);
        }
    }

    // out [heads, dim] = sums over keys of weight * value; each value is read once for all H heads
    template <class T, int H>
    void mix(const T* values, int64_t stride, const float (*weights)[SPLIT], int64_t count, float* out, int64_t apart) {
        const int64_t dim = model->head_dim;
        int64_t d = 0;
        for (; d + 4 * WIDTH <= dim; d += 4 * WIDTH) mix_columns<T, H, 4>(values + d, stride, weights, count, out + d, apart);
        for (; d + WIDTH <= dim; d += WIDTH) mix_columns<T, H, 1>(values + d, stride, weights, count, out + d, apart);
        for (int h = 0; d < dim && h < H; ++h)
            for (int64_t at = d; at < dim; ++at) {
                float total = 0;
                for (int64_t j = 0; j < count; ++j) total = std::fma(weights[h][j], single(values[j * stride + at]), total);
                out[h * apart + at] = total;
            }
    }

    template <class T, int H, int V>
    void mix_columns(const T* values, int64_t stride, const float (*weights)[SPLIT], int64_t count, float* out, int64_t apart) {
        Floats sums[H][V] = {};
        for (int64_t j = 0; j < count; ++j)
            for (int v = 0; v < V; ++v) {
                const Floats value = load(values + j * stride + v * WIDTH);
                for (int h = 0; h < H; ++h) sums[h][v] += weights[h][j] * value;
            }
        for (int h = 0; h < H; ++h)
            for (int v = 0; v < V; ++v) store(out + h * apart + v * WIDTH, sums[h][v]);
    }

    // Puts the pieces of attention together.
    void combine() {
        const int64_t dim = model->head_dim;
        for (int row = 0; row < rows; ++row) {
            const int filled = int(position(row) / SPLIT + 1);
            for (int64_t head = 0; head < model->heads; ++head) {
                const float* part = parts.data() + (row * model->heads + head) * splits * (dim + 2);
                float* out = mixed.data() + (row * model->heads + head) * dim;
                float most = part[0], total = 0;
                for (int split = 1; split < filled; ++split) most = std::max(most, part[split * (dim + 2)]);
                std::fill(out, out + dim, 0.0f);
                for (int split = 0; split < filled; ++split) {
                    const float* from = part + split * (dim + 2);
                    const float factor = std::exp(from[0] - most);
                    total += factor * from[1];
                    for (int64_t k = 0; k < dim; ++k) out[k] += factor * from[2 + k];
                }
                for (int64_t k = 0; k < dim; ++k) out[k] /= total;
            }
        }
    }

    static constexpr int SPIN = 50, MAX_THREADS = 256;  // microseconds; more threads than that do not help
    static constexpr int64_t WARM = 128 << 10;          // bytes that a waiting thread asks for

    std::mutex one_at_a_time;
    struct alignas(64) Claim { std::atomic<uint64_t> ticket{0}; };
    Claim claims[MAX_THREADS];
    alignas(64) std::atomic<uint32_t> done{0};
    alignas(64) std::atomic<uint32_t> generation{0};
    alignas(64) std::atomic<int> threads{1};
    int started = 0;
    uint32_t pieces = 0;  // of this phase

    const Model* model = nullptr;
    const Step* step = nullptr;
    Phase phase = QKV;
    int rows = 0, splits = 0;
    int64_t layer = 0, longest = 0;
    std::vector<int> spans;  // where tokens begin that share pieces of attention, and the end of the last
    std::vector<float> x, normed, projected, queries, mixed, gated, parts, floats;
};

}  // namespace

// 0; or 1 for a token or a length out of range, and 2 without memory, and then nothing is written.
extern "C" int smollm2_decode_step(const Model* model, const Step* step) {
    static Decoder* decoder = new Decoder;
    try {
        return decoder->run(*model, *step);
    } catch (const std::bad_alloc&) {
        return 2;
    }
}

// 32 sums of all bytes, for which order counts. Any change of one word shows: every step is one to one.
extern "C" void smollm2_digest(const char* bytes, int64_t size, uint32_t* sums) {
    constexpr int BYTES = 128, VECTORS = BYTES / int(sizeof(Words));
    Words found[VECTORS];
    for (int v = 0; v < VECTORS; ++v) found[v] = Words{} + uint32_t(v + size);
    const auto take = [&](const char* from) {
        for (int v = 0; v < VECTORS; ++v) {
            const Words mixed = (found[v] ^ read<Words>(from + v * sizeof(Words))) * 0x9e3779b1u;
            found[v] = mixed << 13 | mixed >> 19;
        }
    };
    int64_t at = 0;
    for (; at + BYTES <= size; at += BYTES) {
        __builtin_prefetch(bytes + at + AHEAD);
        __builtin_prefetch(bytes + at + AHEAD + 64);
        take(bytes + at);
    }
    char rest[BYTES] = {};
    memcpy(rest, bytes + at, size_t(size - at));
    take(rest);
    memcpy(sums, found, BYTES);
}
