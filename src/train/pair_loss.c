/* Losses of pairs, with their derivatives. */
#include <math.h>

#include "train/train.h"

/* L = −log σ(d) + c (w + l)² with d = w − l − margin: Bradley & Terry 1952 as in Ouyang et al. 2022
 * equation 1; the centring term is trl's center_rewards_coefficient (Eisenstein et al. 2023). With
 * −log σ(d) = log(1 + e^−d), ∂L/∂d = −σ(−d). */
double psoup__bradley_terry(double w, double l, double margin, double centering, double *dw,
                            double *dl) {
    double d = w - l - margin;
    double tail = exp(-fabs(d)); /* of the stable forms on either side of 0 */
    double loss = fmax(-d, 0.0) + log1p(tail);
    double slope = d > 0.0 ? -tail / (1.0 + tail) : -1.0 / (1.0 + tail);
    double pull = 2.0 * centering * (w + l);
    *dw = slope + pull;
    *dl = -slope + pull;
    return loss + centering * (w + l) * (w + l);
}

/* L = −(1 − s) log σ(d) − s log σ(−d) with d = β (w − l): Rafailov et al. 2023 (arXiv 2305.18290)
 * equation 7; with smoothing s, Mitchell 2023 (A note on DPO with noisy preferences) equation 3. */
double psoup__dpo_loss(double w, double l, double beta, double smoothing, double *dw) {
    double right, wrong, other;
    double loss = psoup__bradley_terry(beta * w, beta * l, 0.0, 0.0, &right, &other);
    double swapped = psoup__bradley_terry(beta * l, beta * w, 0.0, 0.0, &other, &wrong);
    *dw = beta * ((1.0 - smoothing) * right + smoothing * wrong);
    return (1.0 - smoothing) * loss + smoothing * swapped;
}
