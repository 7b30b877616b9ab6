// choose_tokens, verify_drafts: from rows of logits to one token each, with its log-probabilities, and
// how many drafted tokens those choices confirm.
//
// Source   `ops::sample::choose_token`, stage by stage: penalties, bias, mask, forbidden tokens,
//          temperature, top-k, top-p, min-p, draw. Noise is Gumbel noise of a Philox number per (seed,
//          choice, position, token).
// Inputs   logits [.., vocab] f32, as the model made them    rows [n_rows] of `Row`, each naming a row
//          of the logits
//          seen [..] of (token, times generated), each token once per row    bias [..] of (token, f32
//          bits), in the request's order    forbidden [..] tokens    masks [..] words, bit set =
//          allowed, ceil(vocab / 32) per masked row
//          verify_drafts: drafts [n_rows], the token drafted to follow each row; ranges [n] of (first
//          row, rows that have a draft)
// Outputs  choose_tokens: shaped [n_rows, vocab] f32 (scratch), tokens [n_rows], status [n_rows]: 0
//          chosen, 1 a logit is not finite, 2 nothing is allowed; logprobs [n_rows, 21] f32 of the raw
//          logits, chosen token first, then the most likely; top [n_rows, 20] tokens
//          verify_drafts: accepted [n]: leading rows of the range whose token is the drafted one
// Launch   choose_tokens: one block of 512 threads per row. verify_drafts: one thread per range.
// Limit    latency of some ten passes over a row in the second-level cache.
// Arch     sm_80 and later.
// CPU twin `ops::sample::choose_token`: every bit of tokens and log-probabilities is the same. Sums are
//          of integers (`weight`), everything else is rounded where the twin rounds (`real.cuh`).

#include "../include/real.cuh"
#include "../include/reduce.cuh"
#include "../include/top_k.cuh"

constexpr u32 THREADS = 512, WARPS = THREADS / WARP, MAX_TOP = 20, NONE = 0xffffffffu;
// Tokens further below the likeliest, in scaled logits, cannot win.
constexpr double REACH = 40.0;

struct Row {
    float temperature, top_p, min_p;
    u32 top_k; // 0: off
    float repetition, frequency, presence;
    u32 seed_low, seed_high, choice, position;
    u32 first_seen, n_seen, first_bias, n_bias, first_forbidden, n_forbidden;
    u32 first_mask; // NONE: no mask
    u32 n_top;      // NONE: no log-probabilities
    u32 source;     // row of the logits
};

struct ChooseShared {
    u64 bins[BINS];
    double scores[THREADS];
    u32 tokens[THREADS];
    float max[WARPS];
    u32 token[WARPS], equal[WARPS];
    u64 wanted;
    u32 threshold;
};

// The float that `ordered` made `x` of.
INLINE float unordered(u32 x) { return bits_float(x >> 31 ? x ^ 0x80000000u : ~x); }

// The highest value and its lowest index over the block, in every thread.
INLINE void block_argmax(ChooseShared& s, float& value, u32& index) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const float other = shfl_xor(value, lanes);
        const u32 other_index = shfl_xor(index, lanes);
        if (other > value || (other == value && other_index < index)) value = other, index = other_index;
    }
    if (lane_id() == 0) s.max[warp_id()] = value, s.token[warp_id()] = index;
    block_sync();
    value = s.max[0], index = s.token[0];
    for (u32 w = 1; w < WARPS; ++w)
        if (s.max[w] > value || (s.max[w] == value && s.token[w] < index)) value = s.max[w], index = s.token[w];
    block_sync();
}

INLINE u64 shfl_xor64(u64 x, u32 lanes) {
    const u32 low = shfl_xor(static_cast<u32>(x), lanes), high = shfl_xor(static_cast<u32>(x >> 32), lanes);
    return static_cast<u64>(high) << 32 | low;
}

// The sum over the block, in every thread. The bins are used.
INLINE u64 block_sum64(ChooseShared& s, u64 x) {
    for (u32 lanes = WARP / 2; lanes > 0; lanes /= 2) x += shfl_xor64(x, lanes);
    if (lane_id() == 0) s.bins[warp_id()] = x;
    block_sync();
    u64 sum = 0;
    for (u32 w = 0; w < WARPS; ++w) sum += s.bins[w];
    block_sync();
    return sum;
}

// Four random words.
INLINE void philox(const Row& row, u32 group, u32 (&c)[4]) {
    c[0] = group, c[1] = row.position, c[2] = row.choice, c[3] = 0;
    u32 key[2] = {row.seed_low, row.seed_high};
    for (u32 round = 0; round < 10; ++round) {
        const u64 low = static_cast<u64>(0xD2511F53u) * c[0], high = static_cast<u64>(0xCD9E8D57u) * c[2];
        const u32 next[4] = {static_cast<u32>(high >> 32) ^ c[1] ^ key[0], static_cast<u32>(high),
                             static_cast<u32>(low >> 32) ^ c[3] ^ key[1], static_cast<u32>(low)};
        for (u32 i = 0; i < 4; ++i) c[i] = next[i];
        key[0] += 0x9E3779B9u, key[1] += 0xBB67AE85u;
    }
}
INLINE double gumbel(u32 bits) {
    const double uniform = mul_rn64(add_rn64(static_cast<double>(bits), 0.5), 0x1p-32);
    return -ln(-ln(uniform));
}
// No less than that: with u = (bits + 1/2) / 2^32, -ln(-ln(u)) <= -ln(1 - u), and 1 - u is at least
// 2^(-1 - zeros), counted at the top of what is missing to the largest number.
INLINE float gumbel_bound(u32 bits) { return 0.69315f * static_cast<float>(1 + count_leading_zeros(~bits)); }

// The best token so far. Double arithmetic is slow: what single precision shows to be worse than the
// best, by more than its own error, is not looked at.
struct Best {
    double score;
    u32 token;
    float floor, scale, most;

    // Begins with the likeliest token if it is in the running.
    INLINE Best(const Row& row, float most, u32 likeliest, bool is_in)
        : score(-1e300), token(NONE), floor(negative_infinity()),
          scale(static_cast<float>(div_rn64(1.0, row.temperature))), most(most) {
        if (!is_in) return;
        token = likeliest;
        u32 words[4];
        philox(row, likeliest / 4, words);
        const u32 lane = likeliest % 4;
        raise(gumbel(lane == 0 ? words[0] : lane == 1 ? words[1] : lane == 2 ? words[2] : words[3]));
    }
    INLINE void raise(double to) { score = to, floor = static_cast<float>(to) - 0.01f; }
    // Whether a token of this logit cannot win if no noise is above `bound`.
    INLINE bool is_beyond(float x, float bound) const { return (x - most) * scale + bound < floor; }
    INLINE void offer(double other, u32 id) {
        if (other > score || (other == score && id < token)) raise(other), token = id;
    }
};

// Penalties, bias, mask and forbidden tokens: `shaped` from `logits`. False if a logit is not finite.
INLINE bool shape_row(ChooseShared& s, const Row& row, const float* logits, float* shaped, const u32x2* seen,
                      const u32x2* bias, const u32* forbidden, const u32* masks, u32 vocab) {
    const u32 t = threadIdx.x;
    u32 broken = 0;
    for (u32 i = t; i < vocab; i += THREADS) {
        const float x = logits[i];
        // All exponent bits set: NaN or infinite.
        broken |= (float_bits(x) & 0x7f800000u) == 0x7f800000u;
        shaped[i] = x;
    }
    broken = ballot(broken != 0) != 0;
    if (lane_id() == 0) s.token[warp_id()] = broken;
    block_sync();
    for (u32 w = 0; w < WARPS; ++w) broken |= s.token[w];
    block_sync();
    if (broken) return false;

    for (u32 i = t; i < row.n_seen; i += THREADS) {
        const u32 token = seen[row.first_seen + i].v[0], count = seen[row.first_seen + i].v[1];
        if (token >= vocab) continue;
        float x = shaped[token];
        x = x > 0.0f ? div_rn(x, row.repetition) : mul_rn(x, row.repetition);
        if (count > 0)
            x = add_rn(x, -add_rn(mul_rn(row.frequency, static_cast<float>(count)), row.presence));
        shaped[token] = x;
    }
    block_sync();
    // A token may have several: each thread adds those of its own tokens, in order.
    for (u32 i = 0; i < row.n_bias; ++i) {
        const u32x2 entry = bias[row.first_bias + i];
        if (entry.v[0] % THREADS == t && entry.v[0] < vocab)
            shaped[entry.v[0]] = add_rn(shaped[entry.v[0]], bits_float(entry.v[1]));
    }
    block_sync();
    if (row.first_mask != NONE)
        for (u32 i = t; i < vocab; i += THREADS)
            if (!(masks[row.first_mask + i / 32] >> i % 32 & 1)) shaped[i] = negative_infinity();
    block_sync();
    for (u32 i = t; i < row.n_forbidden; i += THREADS) {
        const u32 token = forbidden[row.first_forbidden + i];
        if (token < vocab) shaped[token] = negative_infinity();
    }
    block_sync();
    return true;
}

INLINE u64 shfl_up64(u64 x, u32 delta) {
    const u32 low = shfl_up(static_cast<u32>(x), delta), high = shfl_up(static_cast<u32>(x >> 32), delta);
    return static_cast<u64>(high) << 32 | low;
}

// How far down the order (logit descending) weights must be added to reach `wanted`, or all of them
// if they are less: to `s.threshold`, of which the weight `s.wanted` is still needed. If `wanted` is
// 0, it is the part `fraction` of all weights, at least 1. `weight_of(x, value)` is the weight of a
// token, `extra` is added at the value `at`.
template <class WeightOf>
INLINE void select(ChooseShared& s, const float* logits, u32 vocab, u64 wanted, double fraction, u32 at, u64 extra,
                   const WeightOf& weight_of) {
    const u32 t = threadIdx.x, lane = lane_id();
    if (t == 0) s.threshold = 0, s.wanted = wanted;
    for (u32 shift = 32; shift > 0;) {
        shift -= 8;
        if (t < BINS) s.bins[t] = 0;
        block_sync();
        const u32 known = s.threshold;
        const u64 left = s.wanted;
        for (u32 i = t; i < vocab; i += THREADS) {
            const u32 value = ordered(logits[i]);
            const u64 weight = agrees(value, known, shift) ? weight_of(logits[i], value) : 0;
            if (weight) atomic_add64(&s.bins[value >> shift & (BINS - 1)], weight);
        }
        if (t == 0 && extra && agrees(at, known, shift)) atomic_add64(&s.bins[at >> shift & (BINS - 1)], extra);
        block_sync();
        if (warp_id() == 0) {
            // Lane l owns the bins 255 - 8 l .. 248 - 8 l: sums run from the highest bin down.
            u64 own = 0;
            for (u32 j = 0; j < 8; ++j) own += s.bins[BINS - 1 - 8 * lane - j];
            u64 end = own;
            for (u32 delta = 1; delta < WARP; delta *= 2) {
                const u64 below = shfl_up64(end, delta);
                if (lane >= delta) end += below;
            }
            // What all lanes have, the last one has.
            const u64 total = static_cast<u64>(shfl(static_cast<u32>(end >> 32), WARP - 1)) << 32 |
                              shfl(static_cast<u32>(end), WARP - 1);
            u64 goal = left;
            if (goal == 0) {
                // Only the first time, when all weights are in the bins.
                const double part = mul_rn64(fraction, static_cast<double>(total));
                goal = static_cast<u64>(part);
                goal += static_cast<double>(goal) < part;
                goal = goal ? goal : 1;
            }
            goal = goal < total ? goal : total;
            u64 before = end - own;
            if (before < goal && end >= goal) {
                for (u32 j = 0; j < 8; ++j) {
                    const u32 bin = BINS - 1 - 8 * lane - j;
                    if (before + s.bins[bin] >= goal) {
                        s.threshold = known | bin << shift;
                        s.wanted = goal - before;
                        break;
                    }
                    before += s.bins[bin];
                }
            }
        }
        block_sync();
    }
}

// The token whose score is highest, the lowest among equals; every thread brings one.
INLINE u32 block_best(ChooseShared& s, double score, u32 token) {
    const u32 t = threadIdx.x;
    s.scores[t] = score, s.tokens[t] = token;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        block_sync();
        if (t < half) {
            const double other = s.scores[t + half];
            if (other > s.scores[t] || (other == s.scores[t] && s.tokens[t + half] < s.tokens[t]))
                s.scores[t] = other, s.tokens[t] = s.tokens[t + half];
        }
    }
    block_sync();
    const u32 best = s.tokens[0];
    block_sync();
    return best;
}

// Draw from everything that is allowed.
INLINE u32 draw_from_all(ChooseShared& s, const Row& row, const float* shaped, u32 vocab, float most, u32 likeliest) {
    const double scale = div_rn64(1.0, row.temperature);
    Best best(row, most, likeliest, true);
    for (u32 group = threadIdx.x; group * 4 < vocab; group += THREADS) {
        u32 words[4];
        philox(row, group, words);
        for (u32 lane = 0; lane < 4 && group * 4 + lane < vocab; ++lane) {
            const float x = shaped[group * 4 + lane];
            if (x == negative_infinity() || best.is_beyond(x, gumbel_bound(words[lane]))) continue;
            const double scaled = mul_rn64(add_rn64(x, -static_cast<double>(most)), scale);
            best.offer(add_rn64(scaled, gumbel(words[lane])), group * 4 + lane);
        }
    }
    return block_best(s, best.score, best.token);
}

// Top-k, top-p and min-p, then the draw.
INLINE u32 draw_from_some(ChooseShared& s, const Row& row, const float* shaped, u32 vocab, float most,
                          u32 likeliest) {
    const u32 t = threadIdx.x, lane = lane_id(), warp = warp_id();
    const double temperature = row.temperature, top = most;
    float least = static_cast<float>(add_rn64(top, -mul_rn64(REACH, temperature)));
    // Below every finite number are the forbidden ones; both zeros are above the lower one.
    least = least == 0.0f ? -0.0f : max_f32(least, -0x1.fffffep127f);
    // The likeliest token is kept by every filter, unless it is a negative zero and others are positive.
    Best best(row, most, likeliest, most != 0.0f);
    // A division by one changes nothing and takes as long as any.
    const bool divides = row.temperature != 1.0f;
    const auto scaled_of = [&](float x) {
        const double below = add_rn64(x, -top);
        return divides ? div_rn64(below, temperature) : below;
    };
    // e^-33.5 rounds to no weight at all.
    const auto weight_of = [&](float x) -> u64 {
        return (x - most) * best.scale < -33.5f ? 0 : weight(scaled_of(x));
    };
    // Kept are values above `threshold` and the first `n_equal` tokens equal to it.
    u32 threshold = ordered(least), n_equal = NONE;
    if (row.top_k > 0) {
        select(s, shaped, vocab, row.top_k, 0.0, 0, 0, [&](float x, u32) -> u64 { return x >= least; });
        threshold = s.threshold, n_equal = static_cast<u32>(s.wanted);
        block_sync();
    }
    if (row.top_p < 1.0f) {
        // Tokens equal to top-k's threshold count as often as it kept them.
        const u64 extra = n_equal == NONE ? 0 : n_equal * weight_of(unordered(threshold));
        const u32 at = threshold;
        const auto kept_weight = [&](float x, u32 value) -> u64 {
            const bool is_kept = n_equal == NONE ? x >= least : value > at;
            return is_kept ? weight_of(x) : 0;
        };
        select(s, shaped, vocab, 0, row.top_p, at, extra, kept_weight);
        const u64 each = weight_of(unordered(s.threshold));
        const u64 needed = each ? (s.wanted + each - 1) / each : NONE;
        threshold = s.threshold, n_equal = needed < NONE ? static_cast<u32>(needed) : NONE;
        block_sync();
    }
    const double least_scaled = row.min_p > 0.0f ? ln(row.min_p) : -1e300;
    const double scale = div_rn64(1.0, temperature);
    u32 n_before = 0;
    for (u32 first = 0; first < vocab; first += THREADS) {
        const u32 i = first + t;
        const float x = i < vocab ? shaped[i] : negative_infinity();
        const u32 value = ordered(x);
        const bool is_equal = i < vocab && value == threshold;
        const u32 equal = ballot(is_equal);
        if (lane == 0) s.equal[warp] = popcount(equal);
        block_sync();
        u32 rank = n_before + popcount(equal & ((1u << lane) - 1));
        for (u32 w = 0; w < WARPS; ++w) {
            if (w < warp) rank += s.equal[w];
            n_before += s.equal[w];
        }
        block_sync();
        const bool is_kept = x != negative_infinity() && (value > threshold || (is_equal && rank < n_equal));
        // No noise is above 22.88.
        if (!is_kept || best.is_beyond(x, 22.88f)) continue;
        u32 words[4];
        philox(row, i / 4, words);
        const u32 word = i % 4 == 0 ? words[0] : i % 4 == 1 ? words[1] : i % 4 == 2 ? words[2] : words[3];
        if (best.is_beyond(x, gumbel_bound(word)) || scaled_of(x) < least_scaled) continue;
        best.offer(add_rn64(mul_rn64(add_rn64(x, -top), scale), gumbel(word)), i);
    }
    return block_best(s, best.score, best.token);
}

// Log-probabilities of the chosen and of the likeliest tokens.
INLINE void report(ChooseShared& s, const float* logits, u32 vocab, u32 chosen, u32 n_top, float* logprobs, u32* top) {
    const u32 t = threadIdx.x;
    float bound = 0.0f;
    u32 bound_token = NONE; // none so far
    double total = 0.0;
    for (u32 k = 0; k <= n_top; ++k) {
        // The likeliest token behind the last one found; the first time, the likeliest of all.
        float value = negative_infinity();
        u32 token = NONE;
        for (u32 i = t; i < vocab; i += THREADS) {
            const float x = logits[i];
            const bool is_behind = bound_token == NONE || x < bound || (x == bound && i > bound_token);
            if (is_behind && (x > value || (x == value && i < token))) value = x, token = i;
        }
        block_argmax(s, value, token);
        if (k == 0) {
            u64 own = 0;
            for (u32 i = t; i < vocab; i += THREADS) own += weight(add_rn64(logits[i], -static_cast<double>(value)));
            const double sum = div_rn64(static_cast<double>(block_sum64(s, own)), WEIGHT_ONE);
            total = add_rn64(value, ln(sum));
            if (t == 0)
                logprobs[0] = min_f32(static_cast<float>(static_cast<double>(logits[chosen]) - total), 0.0f);
        }
        if (k == n_top || token == NONE) break;
        if (t == 0) {
            top[k] = token;
            logprobs[1 + k] = min_f32(static_cast<float>(static_cast<double>(value) - total), 0.0f);
        }
        bound = value, bound_token = token;
    }
}

// One block per SM is asked for: left to itself the compiler saves registers by spilling.
extern "C" __global__ void __launch_bounds__(THREADS, 1) choose_tokens(
    const float* __restrict__ logits, const Row* __restrict__ rows, const u32x2* __restrict__ seen,
    const u32x2* __restrict__ bias, const u32* __restrict__ forbidden, const u32* __restrict__ masks,
    float* __restrict__ shaped, u32* __restrict__ tokens, u32* __restrict__ status,
    float* __restrict__ logprobs, u32* __restrict__ top, u32 vocab) {
    ChooseShared& s = shared<ChooseShared>();
    const u32 t = threadIdx.x;
    const Row row = rows[blockIdx.x];
    logits += static_cast<u64>(row.source) * vocab;
    shaped += static_cast<u64>(blockIdx.x) * vocab;
    if (!shape_row(s, row, logits, shaped, seen, bias, forbidden, masks, vocab)) {
        if (t == 0) tokens[blockIdx.x] = NONE, status[blockIdx.x] = 1;
        return;
    }
    float most = negative_infinity();
    u32 likeliest = NONE;
    for (u32 i = t; i < vocab; i += THREADS)
        if (shaped[i] > most) most = shaped[i], likeliest = i;
    block_argmax(s, most, likeliest);
    if (most == negative_infinity()) {
        if (t == 0) tokens[blockIdx.x] = NONE, status[blockIdx.x] = 2;
        return;
    }
    u32 chosen = likeliest;
    // Temperatures too small to divide by are as good as zero; nothing is near an infinite logit.
    const bool is_infinite = most == -negative_infinity();
    if (row.temperature >= 0x1p-126f && row.top_p > 0.0f && row.top_k != 1 && !is_infinite) {
        const bool truncates = row.top_k > 0 || row.top_p < 1.0f || row.min_p > 0.0f;
        chosen = truncates ? draw_from_some(s, row, shaped, vocab, most, likeliest)
                           : draw_from_all(s, row, shaped, vocab, most, likeliest);
    }
    if (t == 0) tokens[blockIdx.x] = chosen, status[blockIdx.x] = 0;
    if (row.n_top != NONE)
        report(s, logits, vocab, chosen, min_u32(row.n_top, MAX_TOP), logprobs + blockIdx.x * (MAX_TOP + 1),
               top + blockIdx.x * MAX_TOP);
}
EMU_KERNEL(choose_tokens)

extern "C" __global__ void __launch_bounds__(128) verify_drafts(
    const u32* __restrict__ tokens, const u32* __restrict__ drafts, const u32x2* __restrict__ ranges,
    u32* __restrict__ accepted, u32 n_ranges) {
    const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n_ranges) return;
    const u32 first = ranges[i].v[0], n = ranges[i].v[1];
    u32 k = 0;
    while (k < n && tokens[first + k] == drafts[first + k]) ++k;
    accepted[i] = k;
}
EMU_KERNEL(verify_drafts)
