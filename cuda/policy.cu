/* Advantages, and the losses of policies: a warp to a response, 32 tokens at a time, all sums in f64 and in one order.
 * The formulas are src/base/policy.h's. A warp has little to do and long to wait, so the next tokens are on their way
 * while these are worked on. */
#include "device.cuh"

/* The recurrence A_t = δ_t + γλ A_{t+1} from the end on: lane l has the l-th token from there. Within a chunk it is a
 * scan, in which a step of d tokens decays by (γλ)^d (Hillis & Steele 1986); what lies behind the chunk is its last
 * lane's. */
PSOUP__KERNEL(gae, PSOUP__POLICY_THREADS) {
    const int lane = threadIdx.x, begin = a.first[blockIdx.x];
    int t = a.first[blockIdx.x + 1] - 1 - lane;
    double power = a.decay; /* becomes (γλ)^(lane + 1) */
    for (int d = 1; d < 32; d *= 2) {
        const double before = __shfl_up_sync(0xffffffffu, power, d);
        power *= lane >= d ? before : 1;
    }
    double carried = 0, next_value = 0;
    float reward = t >= begin ? a.reward[t] : 0, value = t >= begin ? a.value[t] : 0;
    for (; t + lane >= begin; t -= 32) {
        const bool more = t - 32 >= begin;
        const float reward_then = more ? a.reward[t - 32] : 0, value_then = more ? a.value[t - 32] : 0;
        const float later = __shfl_up_sync(0xffffffffu, value, 1);
        double x = psoup__gae_delta(reward, value, lane > 0 ? later : next_value, a.gamma), decay = a.decay;
        for (int d = 1; d < 32; d *= 2, decay *= decay) {
            const double before = __shfl_up_sync(0xffffffffu, x, d);
            x = lane >= d ? psoup__gae_step(x, decay, before) : x;
        }
        x = psoup__gae_step(x, power, carried);
        if (t >= begin) {
            a.advantage[t] = (float)x;
            a.returns[t] = (float)(x + value);
        }
        carried = __shfl_sync(0xffffffffu, x, 31);
        next_value = __shfl_sync(0xffffffffu, value, 31);
        reward = reward_then;
        value = value_then;
    }
}

/* What a token's loss reads. */
struct token {
    float logprob, old, advantage, ref, value, old_value, returns;
};

__device__ __forceinline__ token load_token(const psoup__policy_loss_args &a, const psoup__response &r, int t) {
    token x = {};
    if (t >= r.tokens)
        return x;
    const int64_t at = (int64_t)r.first + t, old = r.old + t;
    x.logprob = a.logprob[at];
    if (!a.objective.whole) {
        x.old = a.old.logprob[old];
        x.advantage = a.old.advantage[old];
    }
    if (a.old.ref)
        x.ref = a.old.ref[old];
    if (a.old.value) {
        x.value = a.value[at];
        x.old_value = a.old.value[old];
        x.returns = a.old.returns[old];
    }
    return x;
}

/* Σ_t log π(t) − log π_old(t), in every lane. */
__device__ __forceinline__ double response_difference(const psoup__policy_loss_args &a, const psoup__response &r) {
    double sum = 0;
#pragma unroll 4
    for (int t = threadIdx.x; t < r.tokens; t += 32)
        sum += (double)a.logprob[(int64_t)r.first + t] - a.old.logprob[r.old + t];
    return warp_sum(sum);
}

PSOUP__KERNEL(policy_loss, PSOUP__POLICY_THREADS) {
    const psoup__response r = a.response[blockIdx.x];
    const double value_scale = a.objective.value_coefficient * r.scale;
    psoup__loss_terms terms = {};
    psoup__slope whole = {};
    token next = load_token(a, r, threadIdx.x);
    if (a.objective.whole) {
        const double difference = response_difference(a, r), ratio = exp(difference);
        whole = psoup__surrogate(ratio, a.old.advantage[r.old], a.objective.clip);
        if (threadIdx.x == 0)
            psoup__count_ratio(&terms, &whole, ratio, difference);
    }
    for (int t = threadIdx.x; t < r.tokens; t += 32) {
        const token x = next;
        next = load_token(a, r, t + 32);
        psoup__slope s = whole;
        if (!a.objective.whole) {
            const double difference = (double)x.logprob - x.old, ratio = exp(difference);
            s = psoup__surrogate(ratio, x.advantage, a.objective.clip);
            psoup__count_ratio(&terms, &s, ratio, difference);
        }
        float d = (float)(s.slope * r.scale);
        if (a.old.ref) {
            const psoup__slope kl = psoup__kl_term(a.objective.estimator, (double)x.logprob - x.ref, r.beta);
            d += (float)(kl.slope * r.scale);
            psoup__count_kl(&terms, &kl);
        }
        a.dlogprob[(int64_t)r.first + t] = d;
        if (a.old.value) {
            const psoup__slope v = psoup__clipped_error(x.value, x.old_value, x.returns, a.objective.value_clip);
            a.dvalue[(int64_t)r.first + t] = (float)(v.slope * value_scale);
            psoup__count_value(&terms, &v);
        }
    }
    double *const sums[] = {&terms.policy_loss, &terms.value_loss, &terms.ratio, &terms.kl, &terms.clipped,
                            &terms.value_clipped};
#pragma unroll
    for (int i = 0; i < (int)(sizeof sums / sizeof *sums); i++)
        *sums[i] = warp_sum(*sums[i]);
    terms.ratios = warp_sum(terms.ratios);
    terms.broken = warp_sum(terms.broken);
    for (int mask = 16; mask > 0; mask >>= 1)
        terms.ratio_max = psoup__ratio_max(terms.ratio_max, __shfl_xor_sync(0xffffffffu, terms.ratio_max, mask));
    terms.tokens = r.tokens;
    if (threadIdx.x == 0)
        a.terms[blockIdx.x] = terms;
}
