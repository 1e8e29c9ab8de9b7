/* What inspect found, as JSON. */
#include "merge/inspect.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Building with a memory for what failed. */
static void put(psoup__inspection *x, psoup_json *object, const char *key, psoup_json *value) {
    x->broken |= psoup_json_set(object, key, value) != 0;
}

static void add(psoup__inspection *x, psoup_json *array, psoup_json *value) {
    x->broken |= psoup_json_append(array, value) != 0;
}

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static void warn(psoup__inspection *x, psoup_json *warnings, const char *format, ...) {
    char text[1024];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    size_t end = strlen(text); /* a name that was cut ends between characters */
    while (end > 0 && !psoup__is_utf8(text))
        text[--end] = '\0';
    add(x, warnings, psoup_json_new_string(text));
}

static psoup_json *vector(psoup__inspection *x, const double *v, size_t n) {
    psoup_json *array = psoup_json_new_array();
    for (size_t i = 0; i < n; i++)
        add(x, array, psoup_json_new_real(v[i]));
    return array;
}

static psoup_json *matrix(psoup__inspection *x, const double *v, size_t n) {
    psoup_json *array = psoup_json_new_array();
    for (size_t i = 0; i < n; i++)
        add(x, array, vector(x, v + i * n, n));
    return array;
}

/* "norms", "gram", "cosine" of a Gram matrix; the cosine with an adapter that is 0 or absent is null. */
static void tell_gram(psoup__inspection *x, psoup_json *to, const double *inner, size_t n, bool with_gram) {
    psoup_json *norms = psoup_json_new_array(), *cosines = psoup_json_new_array();
    for (size_t i = 0; i < n; i++) {
        psoup_json *row = psoup_json_new_array();
        add(x, norms, psoup_json_new_real(sqrt(fmax(inner[i * n + i], 0))));
        for (size_t j = 0; j < n; j++) {
            double both = sqrt(fmax(inner[i * n + i], 0)) * sqrt(fmax(inner[j * n + j], 0));
            add(x, row, both > 0 ? psoup_json_new_real(i == j ? 1 : inner[i * n + j] / both)
                                            : psoup_json_new_null());
        }
        add(x, cosines, row);
    }
    put(x, to, "norms", norms);
    if (with_gram)
        put(x, to, "gram", matrix(x, inner, n));
    put(x, to, "cosine", cosines);
}

/* Of all modules, whose sums are `inner`. */
static void tell_pairs(psoup_json *to, psoup__inspection *x, const double *inner) {
    const size_t n = x->n;
    psoup_json *interference = psoup_json_new_array(), *opposed = psoup_json_new_array();
    for (size_t i = 0; i < n; i++) {
        psoup_json *along = psoup_json_new_array(), *against = psoup_json_new_array();
        for (size_t j = 0; j < n; j++) {
            size_t shared = 0, below = 0;
            for (size_t m = 0; m < x->modules; m++)
                if (x->found[m].there[i] && x->found[m].there[j]) {
                    shared++;
                    below += x->found[m].inner[i * n + j] < 0;
                }
            double own = inner[i * n + i];
            add(x, along, own > 0 ? psoup_json_new_real(inner[i * n + j] / own)
                                             : psoup_json_new_null());
            add(x, against, shared > 0
                                           ? psoup_json_new_real((double)below / (double)shared)
                                           : psoup_json_new_null());
        }
        add(x, interference, along);
        add(x, opposed, against);
    }
    put(x, to, "interference", interference);
    put(x, to, "opposed", opposed);
}

static psoup_json *tell_modules(psoup__inspection *x) {
    psoup_json *modules = psoup_json_new_array();
    for (size_t m = 0; m < x->modules; m++) {
        const psoup__finding *f = &x->found[m];
        psoup_json *one = psoup_json_new_object();
        put(x, one, "name", psoup_json_new_string(f->name));
        put(x, one, "layer", f->layer < 0 ? psoup_json_new_null() : psoup_json_new_integer(f->layer));
        tell_gram(x, one, f->inner, x->n, true);
        put(x, one, "soup_norm", psoup_json_new_real(sqrt(f->exact)));
        put(x, one, "factors_error",
                       f->equal && f->exact > 0 ? psoup_json_new_real(sqrt(f->cross / f->exact))
                                                : psoup_json_new_null());
        put(x, one, "singular_values", psoup_json_new_null());
        if (f->squares != NULL) {
            psoup_json *values = psoup_json_new_array();
            for (int64_t k = 0; k < f->total; k++)
                add(x, values, psoup_json_new_real(sqrt(f->squares[k])));
            put(x, one, "singular_values", values);
        }
        add(x, modules, one);
    }
    return modules;
}

static psoup_json *tell_layers(psoup__inspection *x, double *inner) {
    psoup_json *layers = psoup_json_new_array();
    for (size_t m = 0, end; m < x->modules; m = end) {
        memset(inner, 0, x->n * x->n * sizeof *inner);
        for (end = m; end < x->modules && x->found[end].layer == x->found[m].layer; end++)
            for (size_t k = 0; k < x->n * x->n; k++)
                inner[k] += x->found[end].inner[k];
        psoup_json *one = psoup_json_new_object();
        put(x, one, "layer", x->found[m].layer < 0 ? psoup_json_new_null()
                                                           : psoup_json_new_integer(x->found[m].layer));
        tell_gram(x, one, inner, x->n, false);
        add(x, layers, one);
    }
    return layers;
}

/* One adapter's own facts; *most: the largest rank seen. */
static psoup_json *tell_adapter(psoup__inspection *x, const psoup__peft *adapter, int64_t *most) {
    psoup_json *one = psoup_json_new_object();
    int64_t least = INT64_MAX, largest = 0, parameters = 0;
    for (size_t k = 0; k < adapter->n; k++) {
        const psoup__peft_pair *pair = &adapter->pairs[k];
        least = pair->rank < least ? pair->rank : least;
        largest = pair->rank > largest ? pair->rank : largest;
        parameters += pair->rank * (pair->a.shape[1] + pair->b.shape[0]);
    }
    *most = largest > *most ? largest : *most;
    put(x, one, "path", psoup_json_new_string(adapter->path));
    put(x, one, "modules", psoup_json_new_integer((int64_t)adapter->n));
    put(x, one, "parameters", psoup_json_new_integer(parameters));
    put(x, one, "least_rank", psoup_json_new_integer(adapter->n > 0 ? least : 0));
    put(x, one, "largest_rank", psoup_json_new_integer(largest));
    return one;
}

/* What `factors` would lose, and svd(r) for some r: over all modules, and where it is worst. */
static psoup_json *tell_soup(psoup__inspection *x, int64_t rank, psoup_json *warnings) {
    psoup_json *soup = psoup_json_new_object(), *svd = psoup_json_new_array();
    double exact = 0, cross = 0, worst = 0, weights = 0;
    const char *where = "";
    bool equal = true, spectra = true;
    int64_t total = 0;
    for (size_t i = 0; i < x->n; i++)
        weights += x->weights[i];
    for (size_t m = 0; m < x->modules; m++) {
        const psoup__finding *f = &x->found[m];
        exact += f->exact;
        cross += f->cross;
        equal &= f->equal;
        spectra &= f->squares != NULL;
        total = f->total > total ? f->total : total;
        if (f->exact > 0 && f->cross / f->exact > worst) {
            worst = f->cross / f->exact;
            where = f->name;
        }
    }
    put(x, soup, "weights", vector(x, x->weights, x->n));
    put(x, soup, "norm", psoup_json_new_real(sqrt(exact)));
    psoup_json *factors = psoup_json_new_null();
    if (equal && exact > 0) {
        factors = psoup_json_new_object();
        put(x, factors, "error", psoup_json_new_real(sqrt(cross / exact)));
        put(x, factors, "worst_error", psoup_json_new_real(sqrt(worst)));
        put(x, factors, "worst_module", psoup_json_new_string(where));
        if (cross > 0.01 * exact) {
            warn(x, warnings,
                     "method factors would be %.0f %% away from the exact soup (worst %.0f %%, %s)",
                     100 * sqrt(cross / exact), 100 * sqrt(worst), where);
        }
    } else if (!equal) {
        warn(x, warnings,
             "method factors cannot be used: the adapters' modules, ranks or scales differ");
    }
    put(x, soup, "factors", factors);
    for (int64_t r = 1, next; spectra && exact > 0 && r <= total; r = next) {
        double kept = 0, least = 1;
        const char *at = "";
        next = r < rank && 2 * r > rank ? rank : r < total && 2 * r > total ? total : 2 * r;
        for (size_t m = 0; m < x->modules; m++) {
            const psoup__finding *f = &x->found[m];
            double sum = 0, all = 0;
            for (int64_t k = 0; k < f->total; k++) {
                sum += k < r ? f->squares[k] : 0;
                all += f->squares[k];
            }
            kept += sum;
            if (all > 0 && sum / all < least) {
                least = sum / all;
                at = f->name;
            }
        }
        psoup_json *one = psoup_json_new_object();
        kept = kept < exact ? kept / exact : 1;
        put(x, one, "rank", psoup_json_new_integer(r));
        put(x, one, "energy", psoup_json_new_real(kept));
        put(x, one, "error", psoup_json_new_real(sqrt(1 - kept)));
        put(x, one, "least_energy", psoup_json_new_real(least));
        put(x, one, "least_module", psoup_json_new_string(at));
        add(x, svd, one);
        if (r == rank && kept < 0.99) {
            warn(x, warnings,
                     "svd(%lld) would keep %.1f %% of the soup's energy: an error of %.0f %% (worst: %.1f %% "
                     "kept, %s)",
                     (long long)r, 100 * kept, 100 * sqrt(1 - kept), 100 * least, at);
        }
    }
    put(x, soup, "svd", svd);
    if (fabs(weights - 1) > 1e-6) {
        warn(x, warnings, "the weights sum to %.6g, not to 1", weights);
    }
    return soup;
}

psoup_status psoup__inspect_answer(psoup__inspection *x, psoup_json **out, psoup_error *error) {
    const size_t n = x->n;
    int64_t rank = 0;
    double *inner = psoup__alloc(x->context, n * n, sizeof *inner, error);
    if (inner == NULL)
        return PSOUP_ERROR_MEMORY;
    psoup_json *root = psoup_json_new_object(), *adapters = psoup_json_new_array();
    psoup_json *warnings = psoup_json_new_array();
    for (size_t i = 0; i < n; i++)
        add(x, adapters, tell_adapter(x, x->adapters[i], &rank));
    put(x, root, "adapters", adapters);
    psoup_json *layers = tell_layers(x, inner);
    memset(inner, 0, n * n * sizeof *inner);
    for (size_t m = 0; m < x->modules; m++)
        for (size_t k = 0; k < n * n; k++)
            inner[k] += x->found[m].inner[k];
    tell_gram(x, root, inner, n, true);
    tell_pairs(root, x, inner);
    put(x, root, "soup", tell_soup(x, rank, warnings));
    put(x, root, "layers", layers);
    put(x, root, "modules", tell_modules(x));
    psoup__free(x->context, inner);
    put(x, root, "warnings", warnings);
    if (root == NULL || x->broken) {
        psoup_json_free(root);
        return psoup__out_of_memory(error, 0);
    }
    *out = root;
    return PSOUP_OK;
}
