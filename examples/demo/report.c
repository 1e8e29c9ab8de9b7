/* report.c: the HTML page, in one file without anything from elsewhere. */
#include "demo.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char head[] =
    "<!doctype html><html lang=en><meta charset=utf-8>"
    "<meta name=viewport content='width=device-width,initial-scale=1'>"
    "<title>libpsoup: personal soups, measured</title><style>"
    ":root{--ink:#1d2433;--soft:#667085;--line:#e4e7ec;--paper:#fff;--ground:#f6f7f9;--a:#2563eb;"
    "--b:#e07a2f;--good:#0f8a5f;--bad:#c0362c}"
    "@media(prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#98a2b3;--line:#2b3240;"
    "--paper:#171c26;--ground:#0f131a;--a:#7aa2ff;--b:#f0a468;--good:#4fc998;--bad:#ff8479}}"
    "*{box-sizing:border-box}body{margin:0;background:var(--ground);color:var(--ink);"
    "font:16px/1.55 system-ui,sans-serif}main{max-width:1080px;margin:0 auto;padding:40px 20px "
    "80px}"
    "h1{font-size:34px;line-height:1.15;margin:0 0 8px}h2{font-size:21px;margin:0 0 4px}"
    "p{max-width:74ch}.soft{color:var(--soft)}section{background:var(--paper);"
    "border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin:20px "
    "0;overflow-x:auto}"
    "table{border-collapse:collapse;font-size:14px;font-variant-numeric:tabular-nums;width:100%}"
    "th,td{padding:6px 10px;text-align:right;border-bottom:1px solid "
    "var(--line);white-space:nowrap}"
    "th{color:var(--soft);font-weight:600}th:first-child,td:first-child{text-align:left}"
    "td small{color:var(--soft);display:block;font-size:11.5px}"
    ".grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(236px,1fr));gap:12px}"
    ".card{border:1px solid var(--line);border-radius:10px;padding:12px 14px}"
    ".card b{letter-spacing:.06em;color:var(--a)}.card p{margin:6px 0 0;font-size:15px}"
    ".card small{color:var(--soft)}.pass{color:var(--good)}.fail{color:var(--bad);font-weight:700}"
    ".badge{display:inline-block;border-radius:99px;padding:3px 12px;font-weight:600;"
    "border:1px solid}ul.checks{list-style:none;padding:0;margin:0;font-size:14px;columns:2 420px}"
    "ul.checks li{break-inside:avoid;padding:2px 0}svg text{fill:var(--soft);font-size:11px}"
    ".name{fill:var(--ink);font-size:13px;font-weight:600}figure{margin:0}"
    "figcaption{font-size:13px;font-weight:600}</style><main>";

static void escape(FILE *f, const char *text) {
    for (; *text; text++)
        switch (*text) {
        case '<':
            fputs("&lt;", f);
            break;
        case '>':
            fputs("&gt;", f);
            break;
        case '&':
            fputs("&amp;", f);
            break;
        default: /* a young model's bytes need not be text */
            fputc(*text >= ' ' && *text <= '~' ? *text : '?', f);
        }
}

static void rate_cell(FILE *f, const psoup_rate *r) {
    if (isnan(r->rate)) {
        fputs("<td>–</td>", f);
        return;
    }
    /* Blue where the row wins, orange where it loses; faint near a half. */
    double strength = fabs(r->rate - 0.5) * 0.9;
    fprintf(f,
            "<td style='background:color-mix(in srgb,var(--%s) %.0f%%,transparent)'>%.3f"
            "<small>%.3f–%.3f</small></td>",
            r->rate >= 0.5 ? "a" : "b", 100 * strength, r->rate, r->low, r->high);
}

/* ---- sections
 * -------------------------------------------------------------------------------------- */

static size_t method_index(const contest *c, const char *name) {
    for (size_t m = 0; m < c->n; m++)
        if (!strcmp(c->methods[m].name, name))
            return m;
    return 0;
}

static void examples(FILE *f, const contest *c) {
    static const char *const wish[WORLD_PREFERENCES] = {
        "easy", "expert", "concise", "informative", "friendly", "unfriendly", "sassy", "sarcastic"};
    char question[WORLD_TEXT];
    size_t prompt = 20 % c->n_prompts, soups = method_index(c, "P-SOUPS");
    world_question(&c->prompts[prompt], question);
    fputs("<section><h2>One question, every user</h2><p class=soft>“", f);
    escape(f, question);
    fputs(
        "” is a question no training prompt asked. All answers come from one batch over one base, "
        "each row with its own mix of three policies. One sample each, not chosen.</p><div "
        "class=grid>",
        f);
    for (size_t u = 0; u < c->n_users; u++) {
        fprintf(f, "<div class=card><b>%s</b> <small>%s, %s, %s</small><p>", c->users[u],
                wish[c->members[u][0]], wish[c->members[u][1]], wish[c->members[u][2]]);
        escape(f, contest_response(c, 0, soups, u, prompt));
        fputs("</p></div>", f);
    }
    fputs("</div><p class=soft>The base, told nothing: “", f);
    escape(f, contest_response(c, 0, 0, 0, prompt));
    fputs("”</p></section>", f);
}

/* Each method's win rate over the others, with its interval. */
static void bars(FILE *f, const contest *c) {
    int height = (int)c->n * 34 + 30, left = 110, width = 700;
    fprintf(f, "<svg viewBox='0 0 %d %d' width='100%%' role=img>", left + width + 150, height);
    for (int tick = 0; tick <= 4; tick++)
        fprintf(f,
                "<line x1=%d x2=%d y1=0 y2=%d stroke='var(--line)'%s /><text x=%d y=%d "
                "text-anchor=middle>%.2f</text>",
                left + width * tick / 4, left + width * tick / 4, height - 22,
                tick == 2 ? " stroke-width=2" : "", left + width * tick / 4, height - 6,
                tick / 4.0);
    for (size_t m = 0; m < c->n; m++) {
        const psoup_rate *r = &c->methods[m].against_all;
        int y = (int)m * 34 + 6, rated = (int)m < c->rated;
        fprintf(f,
                "<text class=name x=%d y=%d text-anchor=end>%s</text>"
                "<rect x=%d y=%d width=%.1f height=20 rx=4 fill='var(--%s)' opacity='%s' />"
                "<line x1=%.1f x2=%.1f y1=%d y2=%d stroke='var(--ink)' stroke-width=2 />"
                "<text x=%.1f y=%d>%.3f</text>",
                left - 10, y + 15, c->methods[m].name, left, y, width * r->rate,
                strcmp(c->methods[m].name, "P-SOUPS") ? "a" : "good", rated ? ".75" : ".3",
                left + width * r->low, left + width * r->high, y + 10, y + 10,
                left + width * r->high + 8, y + 15, r->rate);
    }
    fputs("</svg>", f);
}

static void table_methods(FILE *f, const contest *c) {
    fputs("<table><tr><th>method<th>win rate<th>helpfulness<th>KL a token<th>words<th>tokens<th>"
          "updates<th>GFLOP<th>seconds</tr>",
          f);
    for (size_t m = 0; m < c->n; m++) {
        const contest_method *x = &c->methods[m];
        fprintf(f, "<tr><td><b>%s</b><small>%s</small></td>", x->name, x->about);
        rate_cell(f, &x->against_all);
        rate_cell(f, &x->helpful);
        fprintf(
            f,
            "<td>%.3f</td><td>%.1f</td><td>%.2f M</td><td>%lld</td><td>%.0f</td><td>%.1f</td></tr>",
            x->kl_token, x->length, 1e-6 * (double)x->cost.tokens, (long long)x->cost.updates,
            1e-9 * x->cost.flop, x->cost.seconds);
    }
    fputs("</table>", f);
}

static void table_pairs(FILE *f, const contest *c) {
    fputs("<table><tr><th>row over column", f);
    for (size_t b = 0; b < c->n; b++)
        fprintf(f, "<th>%s", c->methods[b].name);
    for (size_t a = 0; a < c->n; a++) {
        fprintf(f, "</tr><tr><td><b>%s</b></td>", c->methods[a].name);
        for (size_t b = 0; b < c->n; b++)
            if (a == b)
                fputs("<td></td>", f);
            else
                rate_cell(f, &c->methods[a].against[b]);
    }
    fputs("</tr></table>", f);
}

static void table_criteria(FILE *f, const contest *c) {
    int criteria = c->n_users == 16 ? 8 : 6;
    fputs("<table><tr><th>method", f);
    for (int k = 0; k < criteria; k++)
        fprintf(f, "<th>%s<br>%s", world_preferences[k].symbol, world_preferences[k].prompt + 9);
    fputs("<th>grammatical</tr>", f);
    for (size_t m = 0; m < c->n; m++) {
        fprintf(f, "<tr><td><b>%s</b></td>", c->methods[m].name);
        for (int k = 0; k < criteria; k++)
            rate_cell(f, &c->methods[m].criterion[k]);
        fprintf(f, "<td>%.1f %%</td></tr>", 100 * c->methods[m].valid);
    }
    fputs("</table>", f);
}

static void contest_sections(FILE *f, const contest *c, const char *title, const char *lead) {
    fprintf(f, "<section><h2>%s</h2><p class=soft>%s</p>", title, lead);
    bars(f, c);
    size_t best = 0;
    for (size_t m = 1; m < c->n; m++)
        if (c->methods[m].against_all.rate > c->methods[best].against_all.rate)
            best = m;
    fprintf(f, "<p>The highest win rate is <b>%s</b>'s: %.3f.</p>", c->methods[best].name,
            c->methods[best].against_all.rate);
    table_methods(f, c);
    fputs(
        "</section><section><h2>Pair by pair</h2><p class=soft>Win rate of the row over the column "
        "by the sum of each user's three criteria; ties left out; 95 % intervals by prompt.</p>",
        f);
    table_pairs(f, c);
    fputs("</section><section><h2>Criterion by criterion</h2><p class=soft>Win rate over the other "
          "methods on one criterion, over the users that have it.</p>",
          f);
    table_criteria(f, c);
    fputs("</section>", f);
}

static void polyline(FILE *f, const double *values, size_t n, double low, double high,
                     const char *color) {
    fprintf(f, "<polyline fill=none stroke='var(--%s)' stroke-width=2 points='", color);
    for (size_t i = 0; i < n; i++)
        fprintf(f, "%.1f,%.1f ", 8 + 284.0 * (double)i / (double)(n > 1 ? n - 1 : 1),
                98 - 86 * (values[i] - low) / (high > low ? high - low : 1));
    fputs("' />", f);
}

static void curves(FILE *f, const demo_run *run) {
    fputs("<section><h2>PPO, step by step</h2><p class=soft><span style='color:var(--a)'>Learned "
          "reward</span> of a rollout, on the scale of its own reward model, and <span "
          "style='color:var(--b)'>KL a token</span> from the base (0 to 0.3).</p><div class=grid>",
          f);
    for (size_t i = 0; i < run->n_curves; i++) {
        const demo_curve *c = &run->curves[i];
        double low = INFINITY, high = -INFINITY;
        for (size_t j = 0; j < c->n; j++) {
            low = fmin(low, c->reward[j]);
            high = fmax(high, c->reward[j]);
        }
        if (!c->n)
            continue;
        fprintf(f,
                "<figure><figcaption>%s</figcaption><svg viewBox='0 0 300 118' width='100%%' "
                "font-size=11>"
                "<line x1=8 x2=292 y1=98 y2=98 stroke='var(--line)' />",
                c->name);
        polyline(f, c->kl, c->n, 0, 0.3, "b");
        polyline(f, c->reward, c->n, low, high, "a");
        fprintf(f,
                "<text x=8 y=112>reward %.2f → %.2f</text><text x=292 y=112 text-anchor=end>KL "
                "%.3f, %zu steps</text></svg></figure>",
                c->reward[0], c->reward[c->n - 1], c->kl[c->n - 1], c->n);
    }
    fputs("</div></section>", f);
}

static void proofs(FILE *f, const demo_run *run) {
    fputs(
        "<section><h2>What each reward model and each policy learned</h2><p class=soft>On held-out "
        "prompts. Agreement of the reward model with the noiseless judge, ties left out; then "
        "policy "
        "minus base on the same prompts, both told the one preference, with paired 95 % "
        "intervals.</p><table><tr><th>preference<th>neutral<th>negative<th>positives<th>learned "
        "reward<th>judge, base<th>judge, policy<th>difference<th>KL a token</tr>",
        f);
    for (int k = 0; k < run->n_preferences; k++) {
        const demo_agreement *a = &run->agreement[k];
        const demo_policy_proof *p = &run->proof[k];
        fprintf(f,
                "<tr><td><b>%s</b><small>%s</small></td><td>%.3f</td><td>%.3f</td><td>%.3f</td>"
                "<td>%+.2f<small>%+.2f to %+.2f</small></td><td>%.2f</td><td>%.2f</td>"
                "<td>%+.2f<small>%+.2f to %+.2f</small></td><td>%.3f</td></tr>",
                world_preferences[k].symbol, world_preferences[k].prompt, a->neutral, a->negative,
                a->positive, p->reward.mean, p->reward.low, p->reward.high, p->judge_base,
                p->judge_policy, p->judge.mean, p->judge.low, p->judge.high, p->kl_token);
    }
    fputs("</table></section>", f);
}

static void objectives(FILE *f, const demo_run *run) {
    fputs("<section><h2>The same by other objectives</h2><p class=soft>Held-out prompts as above: what each "
          "is above the base by the learned reward and by the judge, with paired 95 % intervals. RLOO and "
          "GRPO have as many rollouts and updates as PPO; DPO learns from the reward models' comparisons and "
          "never sees those models; best of 4 trains nothing and asks them.</p><table><tr><th>preference"
          "<th>PPO: reward<th>judge", f);
    for (int m = 0; m < DEMO_OBJECTIVES; m++)
        fprintf(f, "<th>%s: reward<th>judge", demo_objectives[m]);
    fputs("</tr>", f);
    for (int k = 0; k < 6; k++) {
        fprintf(f, "<tr><td><b>%s</b></td>", world_preferences[k].symbol);
        for (int m = -1; m < DEMO_OBJECTIVES; m++) {
            const demo_policy_proof *p = m < 0 ? &run->proof[k] : &run->objective[m][k];
            fprintf(f, "<td>%+.2f<small>%+.2f to %+.2f</small></td><td>%+.2f<small>%+.2f to %+.2f</small></td>",
                    p->reward.mean, p->reward.low, p->reward.high, p->judge.mean, p->judge.low, p->judge.high);
        }
        fputs("</tr>", f);
    }
    fputs("</table></section>", f);
}

void report_write(const char *path, const demo_run *run, const contest *eight, const contest *more,
                  const demo_check *checks, size_t n_checks, double seconds) {
    FILE *f = fopen(path, "w");
    size_t passed = 0;
    if (!f) {
        perror(path);
        exit(1);
    }
    for (size_t i = 0; i < n_checks; i++)
        passed += checks[i].passed != 0;
    fputs(head, f);
    fprintf(
        f,
        "<h1>Personal soups, measured</h1><p>One base model of %lld parameters, trained from "
        "random weights; %zu comparisons by a judge that is wrong every tenth time; a reward "
        "model and a PPO policy for every preference; and a soup of three policies for every "
        "user. All of it through libpsoup's public interface, in %.0f seconds on %d threads.</p>"
        "<p><span class='badge %s'>%zu of %zu checks pass</span> <span class=soft>seed %llu%s "
        "</span></p>",
        (long long)psoup_model_parameters(run->model), run->comparisons, seconds,
        psoup_context_threads(run->context), passed == n_checks ? "pass" : "fail", passed, n_checks,
        (unsigned long long)run->seed, eight->n_seeds > 1 ? " and the two after it" : "");
    examples(f, eight);
    contest_sections(
        f, eight, "Who serves the users better?",
        "Win rate over the other methods, on questions about pairs of animal and aspect "
        "that no training prompt asked. The pale rows are controls: they meet the others "
        "but do not count as anybody's opponents.");
    proofs(f, run);
    if (run->scale.objectives)
        objectives(f, run);
    curves(f, run);
    if (more)
        contest_sections(f, more, "Two preferences come later",
                         "Sassy and sarcastic, for sixteen users. P-SOUPS trains two policies and "
                         "keeps the six; P-MORL trains again over all sixteen users.");
    fprintf(
        f,
        "<section><h2>How it was done</h2><p>The base has read instructions with at most one "
        "preference prompt and obeys it in part: base (%.0f s), data and judge are fixed before "
        "any policy exists. Feedback took %.0f s and reward models %.0f s (%.0f GFLOP); they serve "
        "all methods and are not in the table. No policy or checkpoint was chosen by a held-out "
        "prompt. VB and RLHF give one response for all users; the others are told the user's "
        "three preferences. <i>Wrong soup</i> mixes the three opposite policies under the right "
        "prompts. <i>Factors</i> averages the LoRA's A and B apart, as the paper's released "
        "code does: %.0f %% away from the weighted sum, in the Frobenius norm, since these "
        "policies do not share their first A.</p></section>",
        run->base_cost.seconds, run->feedback_cost.seconds, run->reward_cost.seconds,
        1e-9 * run->reward_cost.flop, 100 * run->factors_error);
    fputs("<section><h2>Checks</h2><ul class=checks>", f);
    for (size_t i = 0; i < n_checks; i++) {
        fprintf(f, "<li><span class=%s>%s</span> ", checks[i].passed ? "pass" : "fail",
                checks[i].passed ? "✓" : "✗");
        escape(f, checks[i].text);
        fputs("</li>", f);
    }
    fputs("</ul></section></main></html>\n", f);
    if (fclose(f)) {
        perror(path);
        exit(1);
    }
}
