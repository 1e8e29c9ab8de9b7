/* The C++ binding, as a caller has it: compiled against an installed root (tests/install.sh), with
 * exceptions and without, as C++17 and C++20. Needs nothing but the library. */
#include <psoup.hpp>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

static int failures;
#define CHECK(what) ((what) ? (void)0 : (std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what), (void)++failures))

using ids = std::vector<std::int32_t>;
using floats = std::vector<float>;

/* The value, or the end of the test. */
template <class T> static T need(psoup::result<T> r, int line) {
    if (!r) {
        std::fprintf(stderr, "%s:%d: %s\n", __FILE__, line, r.error().message.c_str());
        std::exit(1);
    }
    if constexpr (!std::is_void_v<T>) return std::move(r).value();
}
#define NEED(r) need((r), __LINE__)

static psoup::model tiny(const psoup::context &context, std::int32_t vocabulary = 16) {
    auto config = psoup::defaults<psoup_model_config>();
    config.vocab_size = vocabulary;
    config.hidden_size = 16;
    config.intermediate_size = 24;
    config.num_hidden_layers = config.num_attention_heads = 2;
    config.max_position_embeddings = 512;
    config.initializer_range = 0.2f;
    config.eos_token_id = 1;
    return NEED(psoup::model::create(context, config, 5));
}

/* Two adapters, each trained a little, so that they change something. */
static void train(psoup::model &model) {
    auto adapter = psoup::defaults<psoup_adapter_options>();
    CHECK(adapter.rank == 16 && adapter.targets == (PSOUP_Q_PROJ | PSOUP_V_PROJ));
    adapter.rank = 2;
    auto options = psoup::defaults<psoup_sft_options>();
    options.epochs = 4;
    options.learning_rate = 0.05f;
    int reports = 0;
    for (const char *name : {"A", "B"}) {
        adapter.seed++;
        NEED(model.add_adapter(name, adapter));
        const ids tokens{2, 3, 4, 5, *name == 'A' ? 6 : 9};
        const psoup_example example{tokens.data(), tokens.size(), 1};
        NEED(psoup::sft(model, name, {&example, 1}, options, [&](const psoup_step &s) {
            reports++;
            CHECK(std::string(s.subject) == name);
            return true;
        }));
    }
    CHECK(reports >= 8);
    auto stopped = psoup::sft(model, "A", {}, options);
    CHECK(!stopped && stopped.error().status == PSOUP_ERROR_ARGUMENT);
    CHECK((model.adapters() == std::vector<std::string>{"A", "B"}) && model.find_adapter("B") == 1);
}

static void test_errors(const psoup::context &context) {
    auto model = psoup::model::load(context, "nowhere");
    CHECK(!model && model.error().status == PSOUP_ERROR_IO);
    CHECK(model.error().message.find("nowhere") != std::string::npos);
    auto load = psoup::defaults<psoup_load_options>();
    load.dtype = PSOUP_NF4;
    CHECK(psoup::model::load(context, "nowhere", load).error().status == PSOUP_ERROR_IO);
    CHECK(!psoup::parse_dtype("f31") && *psoup::parse_dtype("BF16") == PSOUP_BF16);
    CHECK(psoup::size_of(PSOUP_F16) == 2 && std::string(psoup::name_of(PSOUP_F32)) == "f32");
    CHECK(psoup::result<int>(psoup::error(PSOUP_ERROR_STATE, "no")).value_or(7) == 7);
#if PSOUP_CPP_CAN_THROW
    try {
        psoup::value_or_throw(std::move(model));
        CHECK(false);
    } catch (const psoup::exception &e) {
        CHECK(e.status() == PSOUP_ERROR_IO && std::string(e.what()).find("nowhere") != std::string::npos);
    }
#if defined(PSOUP_CPP_EXCEPTIONS)
    try {
        (void)*psoup::model::load(context, "nowhere");
        CHECK(false);
    } catch (const psoup::exception &) {
    }
#endif
#endif
}

static void test_handles(const psoup::context &context) {
    static_assert(!std::is_copy_constructible_v<psoup::model> && std::is_nothrow_move_constructible_v<psoup::model>);
    psoup::model a = tiny(context);
    psoup_model *raw = a.get();
    psoup::model b = std::move(a);
    CHECK(!a && b.get() == raw && b.parameters() > 0 && b.context_handle() == context.get());
    psoup::model empty;
    CHECK(!empty);
    b = std::move(empty);
    CHECK(!b);
}

static void test_tokenizer(const psoup::context &context) {
    const std::vector<std::string> texts{"soup of the day, soup of the house"}, special{"</s>"};
    auto t = NEED(psoup::tokenizer::train(context, texts, 270, special));
    std::vector<psoup_offset> offsets;
    const ids found = NEED(t.encode("the soup </s>", 0, &offsets));
    CHECK(offsets.size() == found.size() && offsets.back().end == 13);
    CHECK(NEED(t.decode(found)) == "the soup </s>" && NEED(t.decode(found, true)) == "the soup ");
    CHECK(t.token_id("</s>") == found.back() && std::string(t.token(found.back())) == "</s>");
    CHECK(t.token_id("none") == -1 && t.vocab_size() <= 270);
    NEED(t.save("cpp-tokenizer.json"));
    CHECK(NEED(NEED(psoup::tokenizer::load(context, "cpp-tokenizer.json")).encode("soup")).size() == 1);
    std::remove("cpp-tokenizer.json");
}

static void test_scores_and_generation(psoup::model &model) {
    const ids tokens{2, 3, 4, 5};
    const floats first{1, 0}, both{0.5f, 0.5f}, three{1, 0, 0};
    const std::vector<psoup::row> rows{{tokens, {}}, {tokens, first}, {tokens, both}};
    const floats p = NEED(model.logprobs(rows));
    CHECK(p.size() == 9 && p[0] != p[3] && p[3] != p[6]);
    CHECK(NEED(model.logprobs({&rows[1], 1})) == floats(p.begin() + 3, p.begin() + 6));
    CHECK(NEED(model.logits({rows.data(), 1})).size() == 4 * 16);
    const psoup::row factors{tokens, both, PSOUP_MIX_FACTORS};
    CHECK(NEED(model.logprobs({&factors, 1})) != floats(p.begin() + 6, p.end()));
    const psoup::row logits{tokens, both, PSOUP_MIX_LOGITS};
    CHECK(NEED(model.logits({&logits, 1})).size() == 4 * 16);
    const psoup::row wrong{tokens, three};
    CHECK(!model.logprobs({&wrong, 1}));
    CHECK(NEED(model.parse_mix("B=1")) == (floats{0, 1}) && !model.parse_mix("C=1"));

    auto g = NEED(model.gradients({&rows[2], 1}, PSOUP_GRADIENT_MIX));
    CHECK(g.get_named("mix").size() == 2 && g.get_named("nothing").empty());
    CHECK(NEED(model.adapter_data("A")).size() > 0);

    auto sampling = psoup::defaults<psoup_sampling>();
    CHECK(sampling.max_new_tokens == 128 && sampling.temperature == 1);
    sampling.max_new_tokens = 5;
    sampling.ignore_stop = 1;
    const std::vector<psoup::prompt> prompts{{tokens, first, 0, nullptr}, {tokens, both, 1, nullptr, PSOUP_MIX_LOGITS, 1.5f}};
    std::vector<ids> streamed(2);
    auto out = NEED(model.generate(prompts, sampling, [&](const psoup::token &t) {
        streamed[static_cast<std::size_t>(t.id)].push_back(t.token);
        return true;
    }));
    CHECK(out.size() == 2 && out[0].tokens == streamed[0] && out[1].tokens == streamed[1]);
    CHECK(out[0].tokens.size() == 5 && out[0].logprobs.size() == 5 && out[0].finish != PSOUP_FINISH_NONE);
    auto stopped = model.generate(prompts, sampling, [](const psoup::token &) { return false; });
    CHECK(!stopped && stopped.error().status == PSOUP_ERROR_CANCELLED);
#if PSOUP_CPP_CAN_THROW
    bool thrown = false;
    try {
        (void)model.generate(prompts, sampling, [](const psoup::token &) -> bool { throw std::string("mine"); });
    } catch (const std::string &s) {
        thrown = s == "mine";
    }
    CHECK(thrown);
#endif

    auto session = NEED(psoup::session::create(model));
    NEED(session.submit(0, {tokens, first, 0, &sampling}));
    CHECK(!session.submit(1, {tokens, three, 0, nullptr}));
    ids stepped;
    for (std::size_t running = 1; running;)
        running = NEED(session.step([&](const psoup::token &t) { return stepped.push_back(t.token), true; }));
    CHECK(stepped == out[0].tokens);
}

static void test_files(const psoup::context &context, psoup::model &model) {
    NEED(model.save("cpp-base"));
    for (const char *name : {"A", "B"}) NEED(model.save_adapter(name, std::string("cpp-") + name));
    {
        int reports = 0;
        auto merger = NEED(psoup::merger::create(context, psoup::defaults<psoup_merger_options>(),
                                                 [&](const char *, std::int64_t, std::int64_t) { return ++reports > 0; }));
        NEED(merger.set_base("cpp-base"));
        NEED(merger.add("cpp-A", 0.5));
        NEED(merger.add("cpp-B", 0.5));
        psoup::merger moved = std::move(merger); /* its callback moves along */
        NEED(moved.set_weights(std::vector<double>{0.25, 0.75}));
        NEED(moved.write("cpp-soup"));
        CHECK(reports > 0 && NEED(moved.report()).tensors > 0);
    }
    CHECK(NEED(psoup::merge_verify(context, "cpp-soup")) > 0);
    auto again = NEED(psoup::merger::create(context));
    NEED(again.load_certificate("cpp-soup/psoup-merge.json"));
    NEED(again.write("cpp-replayed"));
    auto recipe = NEED(psoup::merger::create(context));
    auto refused = recipe.load_recipe("nowhere.yaml");
    CHECK(!refused && refused.error().message.find("nowhere.yaml") != std::string::npos);
    const std::vector<std::string> adapters{"cpp-A", "cpp-B"};
    auto inspection = NEED(psoup::merge_inspect(context, adapters));
    CHECK(inspection["norms"].size() == 2 && inspection["cosine"][0][0].real() > 0.999);
    NEED(psoup::merge_inspect_plot(context, inspection.view(), "cpp-plot.svg", adapters));
    std::remove("cpp-plot.svg");
    auto merged = NEED(psoup::model::load(context, "cpp-soup"));
    const ids tokens{2, 3, 4, 5, 6};
    const floats mix{0.25f, 0.75f};
    const psoup::row mixed{tokens, mix}, plain{tokens, {}};
    const floats a = NEED(model.logprobs({&mixed, 1})), b = NEED(merged.logprobs({&plain, 1}));
    for (std::size_t i = 0; i < a.size(); i++) CHECK(std::fabs(a[i] - b[i]) < 1e-4f);
    NEED(model.load_adapter("again", "cpp-A"));
    NEED(model.remove_adapter("again"));
    CHECK(NEED(merged.config()).hidden_size == 16);
}

static void test_merging_in_memory(const psoup::context &context) {
    const floats a{1, 2, 3}, b{3, 2, 1};
    const std::vector<const void *> in{a.data(), b.data()};
    const std::vector<double> weights{0.25, 0.75}, one{1};
    floats out(3);
    NEED(psoup::merge_sum(context, out.data(), PSOUP_F32, in, PSOUP_F32, weights, 3));
    CHECK((out == floats{2.5f, 2, 1.5f}));
    CHECK(!psoup::merge_sum(context, out.data(), PSOUP_F32, in, PSOUP_F32, one, 3));
    auto on_gpu = psoup::gpu_merge::create(context);
    CHECK(!on_gpu && on_gpu.error().message.find("the context's device is the CPU") != std::string::npos);
    const floats fa{1, 2, 3}, fb{4, 5}, base(6, 1.0f);
    const psoup_lora_factors factors[]{{fa.data(), fb.data(), 1, 2.0f}};
    floats folded(6), ra(3), rb(2);
    NEED(psoup::merge_fold(context, folded.data(), base.data(), PSOUP_F32, 2, 3, factors, one));
    CHECK((folded == floats{9, 17, 25, 11, 21, 31}));
    CHECK(NEED(psoup::merge_factors(context, PSOUP_MERGE_DELTA, ra, rb, 1, 2, 3, factors, one)) < 1e-6);
    CHECK(ra[1] * rb[1] == 20);
    psoup_merge_module module{};
    module.factors = factors;
    module.weights = one.data();
    module.count = 1;
    module.out_features = 2;
    module.in_features = 3;
    module.rank = 1;
    floats qa(3), qb(2);
    module.a_out = qa.data();
    module.b_out = qb.data();
    NEED(psoup::merge_factors_batch(context, PSOUP_MERGE_DELTA, {&module, 1}));
    CHECK(qa[1] * qb[1] == 20);
    floats part{0, 0};
    psoup_merge_view slice{}, whole{};
    slice.data = part.data();
    slice.rows = 1;
    slice.columns = 2;
    whole = slice;
    whole.data = const_cast<float *>(base.data());
    NEED(psoup::merge_fold_view(context, slice, whole, 1, 1, 2, 3, factors, one));
    CHECK((part == floats{21, 31}));
    NEED(psoup::merge_views(context, slice, {&whole, 1}, one));
    CHECK((part == floats{1, 1}));
    part = {7, 7};
    NEED(psoup::merge_copy(context, slice, whole));
    CHECK((part == floats{1, 1}));
    slice.place = PSOUP_MERGE_DEVICE;
    CHECK(!psoup::merge_copy(context, slice, slice)); /* there is none */
    NEED(psoup::set_merge_device(context, nullptr));
    CHECK(!psoup::merge_factors(context, PSOUP_MERGE_DELTA, {ra.data(), 2}, rb, 1, 2, 3, factors, one));
}

static void test_merging_what_the_caller_holds(const psoup::context &context) {
    CHECK(std::string(psoup::merge_method_name(PSOUP_MERGE_TIES)) == "ties");
    CHECK(NEED(psoup::parse_merge_method("slerp")) == PSOUP_MERGE_SLERP && !psoup::parse_merge_method("blend"));
    const floats base{1, 1, 1, 1}, a{2, 1, 0, 1}, b{1, 3, 1, 1};
    const std::int64_t shape[]{2, 2};
    auto named = [&](const float *data) {
        psoup_named_tensor t{};
        t.name = "w";
        t.dtype = PSOUP_F32;
        t.rank = 2;
        t.shape = shape;
        t.data = data;
        return t;
    };
    const psoup_named_tensor in_base = named(base.data()), in_a = named(a.data()), pulled = named(nullptr);
    auto options = psoup::defaults<psoup_merger_options>();
    options.method = PSOUP_MERGE_TASK_ARITHMETIC;
    options.any_sum = 1;
    auto merger = NEED(psoup::merger::create(context, options));
    NEED(merger.set_base(psoup::tensors{"base", {&in_base, 1}}));
    NEED(merger.add(psoup::tensors{"a", {&in_a, 1}}, 1));
    bool broken = false;
    NEED(merger.add(psoup::tensors{"b", {&pulled, 1}, [&](std::size_t, std::uint64_t offset, std::size_t bytes, void *out) {
        if (broken) return false;
        std::copy_n(reinterpret_cast<const char *>(b.data()) + offset, bytes, static_cast<char *>(out));
        return true;
    }}, 0.5));
    floats out(4);
    psoup::sink into;
    into.tensor = [&](const char *name, psoup_dtype dtype, psoup::span<const std::int64_t> s) {
        return name == std::string("w") && dtype == PSOUP_F32 && s.size() == 2 && s[1] == 2;
    };
    into.write = [&](std::uint64_t offset, const void *data, std::size_t bytes) {
        std::copy_n(static_cast<const char *>(data), bytes, reinterpret_cast<char *>(out.data()) + offset);
        return true;
    };
    NEED(merger.run(into));
    CHECK((out == floats{2, 2, 0, 1}));
    NEED(merger.set_parameter("lambda", std::vector<double>{2}));
    NEED(merger.run(into));
    CHECK((out == floats{3, 3, -1, 1}));
    into.write = [](std::uint64_t, const void *, std::size_t) { return false; };
    auto stopped = merger.run(into);
    CHECK(!stopped && stopped.error().status == PSOUP_ERROR_CANCELLED);
    broken = true;
    CHECK(!merger.run(into));
}

static void test_rewards_and_ppo(psoup::model &model) {
    auto small = psoup::defaults<psoup_adapter_options>();
    small.rank = 2;
    auto reward = NEED(psoup::reward::create(model, "R", small));
    const ids good{2, 3, 9}, bad{2, 3, 5}, asked{2, 3};
    const psoup_comparison comparison{good.data(), good.size(), bad.data(), bad.size(), 0, 0.0f};
    auto options = psoup::defaults<psoup_reward_options>();
    options.epochs = 10;
    options.learning_rate = 0.05f;
    const std::vector<psoup::reward *> rewards{&reward};
    NEED(psoup::train_rewards(rewards, {&comparison, 1}, options));
    CHECK(NEED(psoup::reward_accuracy(rewards, {&comparison, 1})).rate == 1);
    const std::vector<psoup::row> rows{{good, {}}, {bad, {}}};
    const floats scores = NEED(reward.score(rows));
    CHECK(scores[0] > scores[1] && std::string(reward.name()) == "R");
    NEED(reward.save("cpp-reward"));
    CHECK(NEED(NEED(psoup::reward::load(model, "R2", "cpp-reward")).score(rows)) == scores);

    const ids yes{9}, no{5};
    psoup_dpo_pair pair{};
    pair.prompt = asked.data();
    pair.n_prompt = asked.size();
    pair.chosen = yes.data();
    pair.rejected = no.data();
    pair.n_chosen = pair.n_rejected = 1;
    auto dpo_options = psoup::defaults<psoup_dpo_options>();
    double before = 0, after = 0;
    dpo_options.max_steps = 5;
    dpo_options.learning_rate = 0.01f;
    NEED(psoup::dpo(model, {"A"}, {&pair, 1}, dpo_options, [&](const psoup_step &s) {
        after = s.values[0];
        before = s.step == 1 ? after : before;
        return true;
    }));
    CHECK(after < before && !psoup::dpo(model, {"nobody"}, {&pair, 1}, dpo_options));
    {
        int told = 0;
        auto steps = NEED(psoup::training::dpo(model, {"A"}, {&pair, 1}, dpo_options,
                                               [&](const psoup_step &) { return ++told > 0; }));
        auto moved = std::move(steps); /* its callback moves along */
        CHECK(NEED(moved.step()) == 4 && told == 1);
        NEED(moved.run());
        CHECK(told == 5);
        CHECK(NEED(NEED(psoup::training::rewards(rewards, {&comparison, 1}, options)).step()) == 9);
        const psoup_example example{good.data(), good.size(), 1};
        CHECK(NEED(NEED(psoup::training::sft(model, "B", {&example, 1})).step()) == 0);
        CHECK(!psoup::training::sft(model, "nobody", {&example, 1}));
    }

    auto best_options = psoup::defaults<psoup_best_options>();
    best_options.n = 3;
    const std::vector<psoup::prompt> questions{{asked, {}}};
    const auto found = NEED(psoup::best_of_n(model, questions, {&reward}, {}, best_options));
    CHECK(found.size() == 1 && found[0].candidates.size() == 3 && found[0].scores.size() == 3);
    for (float score : found[0].scores) CHECK(score <= found[0].scores[found[0].chosen]);
    ids read = asked;
    read.insert(read.end(), found[0].answer().tokens.begin(), found[0].answer().tokens.end());
    CHECK(NEED(reward.score(std::vector<psoup::row>{{read, {}}}))[0] == found[0].scores[found[0].chosen]);
    CHECK(NEED(psoup::best_of_n(model, questions, {},
                                [](psoup::span<const psoup_rollout> r, psoup::span<float> out) {
                                    for (std::size_t i = 0; i < r.size(); i++) out[i] = i == 1 ? 1.0f : 0.0f;
                                    return true;
                                }))[0]
              .chosen == 1);
    CHECK(!psoup::best_of_n(model, questions, {}));
    const auto paid = [](psoup::span<const psoup_rollout> r, psoup::span<float> out) {
        for (std::size_t i = 0; i < r.size(); i++) out[i] = i == 2 ? 1.0f : 0.0f;
        return true;
    };
    const auto weighed = NEED(psoup::best_of_n(model, questions, {}, {}, best_options, psoup::defaults<psoup_sampling>(),
                                               psoup::defaults<psoup_session_options>(),
                                               {{"taste", &reward}, {"third", nullptr, paid, 1000.0f}}));
    CHECK(weighed[0].chosen == 2 && std::fabs(weighed[0].scores[1] - found[0].scores[1]) < 1e-4f);

    psoup_ppo_prompt prompt{};
    prompt.tokens = asked.data();
    prompt.n = asked.size();
    prompt.id = 42;
    int called = 0;
    psoup::policy by_function, by_model;
    by_function.adapter = "A";
    by_function.prompts = {&prompt, 1};
    by_function.function = [&](psoup::span<const psoup_rollout> rollouts, psoup::span<float> out) {
        for (std::size_t i = 0; i < rollouts.size(); i++) {
            CHECK(rollouts[i].prompt->id == 42 && std::string(rollouts[i].policy) == "A");
            out[i] = static_cast<float>(rollouts[i].n);
        }
        called++;
        return true;
    };
    by_model.adapter = "B";
    by_model.prompts = by_function.prompts;
    by_model.rewards = rewards;
    auto ppo_options = NEED(psoup::ppo_preset("rlphf"));
    CHECK(!psoup::ppo_preset("unheard-of"));
    ppo_options = psoup::defaults<psoup_ppo_options>();
    ppo_options.steps = 2;
    ppo_options.batch_size = 4;
    ppo_options.ppo_epochs = 1;
    ppo_options.max_new_tokens = 4;
    ppo_options.samples_every = 1;
    ppo_options.samples_count = 1;
    int reports = 0, said = 0;
    {
        auto ppo = NEED(psoup::ppo::create(
            model, {by_function, by_model}, ppo_options, [&](const psoup_step &) { return ++reports > 0; },
            [&](std::int64_t step, psoup::span<const psoup_rollout> r, psoup::span<const float> scores) {
                CHECK(step == said++ / 2 && r.size() == 1 && r[0].prompt->id == 42 && scores.size() == 1);
                return true;
            }));
        psoup::ppo moved = std::move(ppo); /* its callbacks move along */
        CHECK(NEED(moved.step()) == 1);
        CHECK(NEED(moved.trace(0)).rollouts == 4 && !moved.diverged(0));
        NEED(moved.run());
        CHECK(called >= 2 && reports >= 4 && said == 6);
    }
    ppo_options.samples_every = 0;
    {
        psoup::policy several;
        several.adapter = "B";
        several.prompts = by_function.prompts;
        several.sources = {{"judge", rewards[0], {}, 2.0f},
                           {"tokens", nullptr, [](psoup::span<const psoup_rollout> r, psoup::span<float> out) {
                                for (std::size_t i = 0; i < r.size(); i++)
                                    out[i] = static_cast<float>(r[i].n);
                                return true;
                            }, -0.5f}};
        double judge = 0, tokens = 0, all = 0;
        auto ppo = NEED(psoup::ppo::create(model, {several}, ppo_options, [&](const psoup_step &step) {
            for (std::size_t i = 0; i < step.n; i++) {
                const std::string name = step.names[i];
                (name == "reward/judge" ? judge : name == "reward/tokens" ? tokens : all) +=
                    name.compare(0, 6, "reward") == 0 && name.find('_') == std::string::npos ? step.values[i] : 0;
            }
            return true;
        }));
        NEED(ppo.step());
        CHECK(tokens >= 1 && std::fabs(all - (2.0 * judge - 0.5 * tokens)) < 1e-4);
    }
    {
        psoup::policy soup = by_function;
        int by_adapter[2] = {0, 0};
        soup.adapter = "soup";
        soup.soup = {"A", "B"};
        soup.concentration = 2.0f;
        soup.function = [&](psoup::span<const psoup_rollout> rollouts, psoup::span<float> out) {
            by_adapter[std::string(rollouts[0].policy) == "B"]++;
            for (std::size_t i = 0; i < rollouts.size(); i++)
                out[i] = 0.0f;
            return true;
        };
        auto ppo = NEED(psoup::ppo::create(model, {soup}, ppo_options));
        NEED(ppo.step());
        auto trace = NEED(ppo.trace(0));
        CHECK(trace.adapters == 2 && trace.mix[0] > 0 && trace.mix[0] < 1 && by_adapter[0] && by_adapter[1]);
        ppo = psoup::ppo();
        const psoup::reward_function length = [](psoup::span<const psoup_rollout> r, psoup::span<float> out) {
            for (std::size_t i = 0; i < r.size(); i++) out[i] = static_cast<float>(r[i].n);
            return true;
        };
        soup.function = nullptr;
        soup.sources = {{"judge", rewards[0], {}, 2.0f}, {"long", nullptr, length}, {"short", nullptr, length, -1, 1}};
        ppo = NEED(psoup::ppo::create(model, {soup}, ppo_options));
        NEED(ppo.step());
        soup.sources[2].adapter = 0;
        ppo = psoup::ppo();
        CHECK(!psoup::ppo::create(model, {soup}, ppo_options)); /* "B" is paid for nothing */
    }
    {
        psoup_memory taken = NEED(psoup::ppo::memory(model, {by_function, by_model}, ppo_options));
        CHECK(taken.learning > 0 && taken.cache > 0 && taken.host > taken.held && taken.device_free == -1);
    }
    by_function.function = [](psoup::span<const psoup_rollout>, psoup::span<float>) { return false; };
    psoup::ppo other = NEED(psoup::ppo::create(model, {by_function}, ppo_options));
    CHECK(!other.run());
    other = psoup::ppo(); /* an adapter is trained by one run at a time */
#if PSOUP_CPP_CAN_THROW
    by_function.function = [](psoup::span<const psoup_rollout>, psoup::span<float>) -> bool { throw 7; };
    other = NEED(psoup::ppo::create(model, {by_function}, ppo_options));
    int thrown = 0;
    try {
        (void)other.run();
    } catch (int x) {
        thrown = x;
    }
    CHECK(thrown == 7);
#endif
}

static void test_evaluation(const psoup::context &context) {
    auto p = NEED(psoup::preferences::paper(context));
    CHECK(p.size() == 6 && p.find("P2B") == 3 && std::string(p[0].symbol) == "P1A" && p.users() == 8);
    const psoup::user u = NEED(p.user(7));
    CHECK(u.name == "BBB" && u.members.size() == 3);
    CHECK(NEED(psoup::fill_template("Q: {instruction}", "Cook")) == "Q: Cook");

    auto judge = NEED(psoup::judge::create(context, [](psoup::span<const psoup_question> q, psoup::span<std::int32_t> v) {
        for (std::size_t i = 0; i < q.size(); i++)
            v[i] = std::string(q[i].a).size() > std::string(q[i].b).size() ? PSOUP_A_WINS : PSOUP_B_WINS;
        return true;
    }));
    psoup_question q{};
    q.prompt = "p";
    q.a = "longer";
    q.b = "short";
    CHECK(NEED(judge.ask({&q, 1})) == ids{PSOUP_A_WINS});
    const std::vector<const char *> prompts{"p"}, a{"xx"}, b{"x"};
    const ids criteria{0, 2}, unread{0, 0};
    psoup_duel duel{};
    duel.preferences = criteria.data();
    duel.verdicts = unread.data();
    duel.n = 2;
    duel.helpfulness = PSOUP_UNPARSED;
    ids verdicts(2), helpful(1);
    NEED(judge.duels(p, prompts, a, b, {&duel, 1}, true, verdicts, helpful));
    CHECK((verdicts == ids{1, 1} && helpful == ids{1}));
    CHECK(!judge.duels(p, prompts, a, b, {&duel, 1}, true, {verdicts.data(), 1}));
    duel.verdicts = verdicts.data();
    CHECK(NEED(psoup::winrate_aggregate(context, {&duel, 1})).wins == 1);
    CHECK(NEED(psoup::winrate_criterion(context, {&duel, 1}, 2)).rate == 1);
    CHECK(NEED(psoup::winrate_helpfulness(context, {&duel, 1})).wins == 0);
    const std::vector<std::string> command{"sh", "-c", "sed 's/.*\"id\": *\\([0-9]*\\).*/{\"id\": \\1, \"verdict\": \"b\"}/'"};
    auto program = NEED(psoup::judge::command(context, command));
    NEED(program.set_patience(20));

    const std::vector<std::string> texts{"Generate soup"};
    auto t = NEED(psoup::tokenizer::train(context, texts, 260));
    psoup::model generator = tiny(context, t.vocab_size());
    auto sampling = psoup::defaults<psoup_sampling>();
    sampling.max_new_tokens = 3;
    auto options = psoup::defaults<psoup_feedback_options>();
    options.sampling = &sampling;
    const psoup_instruction instruction{"Cook", nullptr, 1};
    const auto counts = NEED(psoup::feedback(generator, t, p, {&instruction, 1}, judge, "cpp-feedback.jsonl", options,
                                             [](const char *, std::int64_t, std::int64_t) { return true; }));
    auto rows = NEED(psoup::jsonl_reader::open(context, "cpp-feedback.jsonl"));
    std::size_t n = 0;
    while (auto row = NEED(rows.next())) n += row["completion_a"].kind() == PSOUP_JSON_STRING;
    CHECK(n == counts.written && n > 0 && rows.line() > 0);
    std::remove("cpp-feedback.jsonl");
}

static void test_data(const psoup::context &context) {
    auto list = psoup::json::array();
    CHECK(list.append(psoup::json::from(1)) && list.append(psoup::json::from(2.5)) && list.append(psoup::json::null()));
    auto object = psoup::json::object();
    CHECK(object.set("list", std::move(list)) && object.set("name", psoup::json::from("soup")) &&
          object.set("good", psoup::json::from(true)));
    CHECK(object.view().text() == "{\"list\":[1,2.5,null],\"name\":\"soup\",\"good\":true}" ||
          object.view().text() == "{\"list\": [1, 2.5, null], \"name\": \"soup\", \"good\": true}");
    NEED(object.write(context, "cpp.json"));
    auto again = NEED(psoup::json::read(context, "cpp.json"));
    CHECK(again["list"][1].real() == 2.5 && again["list"].size() == 3 && again["name"].string() == std::string("soup"));
    CHECK(again["good"].boolean() && again["list"][0].integer() == 1 && again["nothing"].is_null());
    std::string keys;
    again.view().each([&](const char *key, psoup::json_view) { keys += key; });
    CHECK(keys == "listnamegood");
    CHECK(psoup::json::copy(again["list"])[0].integer() == 1);
    auto bad = psoup::json::parse("{\"a\": }", "bad.json");
    CHECK(!bad && bad.error().status == PSOUP_ERROR_FORMAT);

    auto writer = NEED(psoup::jsonl_writer::create(context, "cpp.jsonl"));
    NEED(writer.write(again.view()));
    NEED(writer.close());
    auto reader = NEED(psoup::jsonl_reader::open(context, "cpp.jsonl"));
    CHECK(NEED(reader.next())["name"].string() == std::string("soup") && !NEED(reader.next()));

    auto options = psoup::defaults<psoup_sft_options>();
    auto given = NEED(psoup::json::parse("{\"epochs\": 3, \"schedule\": \"cosine\"}"));
    NEED(psoup::read_fields(psoup::sft_fields(), given.view(), "given", options));
    CHECK(options.epochs == 3 && options.schedule == PSOUP_SCHEDULE_COSINE);
    const psoup_field *tables[]{psoup::sft_fields(), psoup::reward_fields(), psoup::dpo_fields(),
                                psoup::ppo_fields()};
    NEED(psoup::check_fields(tables, given.view(), "given"));
    CHECK(!psoup::check_fields(tables, again.view(), "again"));
    CHECK(psoup::fields_json(psoup::sft_fields(), options)["epochs"].integer() == 3);

    const float x[2]{1, 2};
    const std::int64_t shape[1]{2};
    psoup_named_tensor tensor{};
    tensor.name = "x";
    tensor.dtype = PSOUP_F32;
    tensor.rank = 1;
    tensor.shape = shape;
    tensor.data = x;
    NEED(psoup::write_safetensors(context, "cpp.safetensors", {&tensor, 1}));
    std::ifstream file("cpp.safetensors", std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    CHECK(bytes.size() > 16 && bytes.find("\"x\"") != std::string::npos);
    for (const char *name : {"cpp.json", "cpp.jsonl", "cpp.safetensors"}) std::remove(name);
}

int main() {
    CHECK(psoup::version() == std::to_string(PSOUP_VERSION_MAJOR) + "." + std::to_string(PSOUP_VERSION_MINOR) + "." +
                                  std::to_string(PSOUP_VERSION_PATCH));
    auto options = psoup::defaults<psoup_context_options>();
    options.threads = 2;
    int lines = 0;
    auto context = NEED(psoup::context::create(options, [&](psoup_log_level, const char *) { lines++; }));
    CHECK(context.threads() == 2 && context.isa()[0]);
    psoup::model model = tiny(context);
    train(model);
    test_errors(context);
    test_handles(context);
    test_tokenizer(context);
    test_scores_and_generation(model);
    test_files(context, model);
    test_merging_in_memory(context);
    test_merging_what_the_caller_holds(context);
    test_rewards_and_ppo(model);
    test_evaluation(context);
    test_data(context);
    return failures ? 1 : 0;
}
