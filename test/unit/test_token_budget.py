"""How many prompt tokens a pass may have beside decoding requests, learnt from times that the test makes up."""

import pytest
from ramet.srt.managers.token_budget import ALONE_TARGETS, MIN_TOKENS, START_TOKENS, TokenBudget

TARGET_S, MOST_S, BASE_S, TOKEN_S, LIMIT = 0.04, 0.1, 0.005, 20e-6, 8192


def pass_s(num_tokens, base_s=BASE_S, token_s=TOKEN_S):
    """What a pass takes: the first 200 tokens are free."""
    return base_s + token_s * max(0, num_tokens - 200)


def run(budget, num_passes, num_wanted=10**6, num_waiting=0, **times):
    """Passes that are filled as far as they may, or with what there is; what each of them takes."""
    taken = []
    for _ in range(num_passes):
        num_tokens = min(num_wanted, budget.num_tokens(is_decoding=True, num_waiting=num_waiting))
        taken.append(pass_s(num_tokens, **times))
        budget.observe(taken[-1], num_tokens)
    return taken


@pytest.fixture()
def budget():
    """One that has settled."""
    budget = TokenBudget(LIMIT, TARGET_S, MOST_S)
    budget.observe(BASE_S, 0)
    run(budget, 20)
    return budget


def test_without_decoding_requests_a_pass_may_take_longer(budget):
    """Whoever comes meanwhile waits for its end."""
    num_tokens = budget.num_tokens(is_decoding=False)
    assert 2 * budget.num_tokens(is_decoding=True) < num_tokens < LIMIT
    assert 2 * TARGET_S < pass_s(num_tokens) < 1.15 * ALONE_TARGETS * TARGET_S


@pytest.mark.parametrize("token_s", [0.0, TOKEN_S / 8])
def test_without_decoding_requests_the_limit_holds_alone_while_tokens_are_cheap_or_nothing_is_known(token_s):
    budget = TokenBudget(LIMIT, TARGET_S, MOST_S)
    if token_s:
        run(budget, 20, token_s=token_s)
    assert budget.num_tokens(is_decoding=False) == LIMIT


def test_without_a_target_the_limit_holds_alone():
    budget = TokenBudget(LIMIT, 0.0, 0.0)
    run(budget, 3)
    assert budget.num_tokens(is_decoding=True) == LIMIT and budget.token_s == pytest.approx(TOKEN_S, rel=0.1)


def test_it_begins_with_caution_and_settles_at_the_target_without_missing_it_by_much():
    budget = TokenBudget(LIMIT, TARGET_S, MOST_S)
    assert budget.num_tokens(is_decoding=True) == START_TOKENS
    budget.observe(BASE_S, 0)
    taken = run(budget, 12)
    assert max(taken) < 1.15 * TARGET_S
    assert taken[-1] == pytest.approx(TARGET_S, rel=0.02)


def test_where_tokens_are_dear_a_small_chunk_is_enough_to_see_it():
    """A CPU needs a second for as many as a pass may have at first."""
    budget = TokenBudget(2048, 0.5, 0.5)
    budget.observe(0.3, 200)
    assert budget.num_tokens(is_decoding=True) == pytest.approx(333, abs=1)


@pytest.mark.parametrize("limit", [7, 100, 1000])
def test_the_limit_is_never_exceeded(limit):
    budget = TokenBudget(limit, TARGET_S, MOST_S)
    assert budget.num_tokens(is_decoding=True) == limit
    run(budget, 5)
    assert budget.num_tokens(is_decoding=True) == limit


def test_prompts_advance_however_slow_the_passes_are(budget):
    run(budget, 20, base_s=0.2)
    budget.observe(0.2, 0)
    assert budget.num_tokens(is_decoding=True) == MIN_TOKENS


@pytest.mark.parametrize("token_s", [TOKEN_S / 4, 4 * TOKEN_S])
def test_a_change_is_learnt_within_a_few_passes(budget, token_s):
    assert run(budget, 8, token_s=token_s)[-1] == pytest.approx(TARGET_S, rel=0.15)


def test_tokens_behind_a_long_prefix_get_dearer_and_the_passes_keep_to_the_target(budget):
    taken, prefix = [], 0
    while prefix < 120_000:
        num_tokens = budget.num_tokens(is_decoding=True)
        taken.append(pass_s(num_tokens, token_s=TOKEN_S * (1 + prefix / 20_000)))
        budget.observe(taken[-1], num_tokens)
        prefix += num_tokens
    assert max(taken) < 1.2 * TARGET_S


@pytest.mark.parametrize("outlier_s", [0.0, 1e-6, 3.0])
@pytest.mark.parametrize("has_prompt", [False, True])
def test_an_outlier_is_got_over(budget, outlier_s, has_prompt):
    before = budget.num_tokens(is_decoding=True)
    budget.observe(outlier_s, before if has_prompt else 0)
    assert before / 2 < budget.num_tokens(is_decoding=True) <= 2 * before
    assert max(run(budget, 6)) < 2 * TARGET_S
    assert budget.num_tokens(is_decoding=True) == pytest.approx(before, rel=0.15)


def test_chunks_whose_tokens_are_nearly_free_teach_nothing(budget):
    before = budget.num_tokens(is_decoding=True)
    run(budget, 100, num_wanted=250)
    assert budget.num_tokens(is_decoding=True) == before


def test_small_chunks_that_miss_the_target_do(budget):
    before = budget.num_tokens(is_decoding=True)
    run(budget, 3, num_wanted=400, token_s=10 * TOKEN_S)
    assert budget.num_tokens(is_decoding=True) < before / 2


def test_a_base_that_has_become_less_is_seen_although_every_pass_has_prompts():
    budget = TokenBudget(LIMIT, TARGET_S, MOST_S)
    for _ in range(3):
        budget.observe(2 * TARGET_S, 0)
    taken = run(budget, 25)
    assert taken[0] < TARGET_S and taken[-1] == pytest.approx(TARGET_S, rel=0.05)


def test_a_backlog_lets_passes_take_longer_the_more_the_longer_it_is(budget):
    """Each pass takes time that is no prompt's: of those that decode, and of the weights."""
    usual = budget.num_tokens(is_decoding=True)
    taken = [run(budget, 5, num_waiting=number * usual)[-1] for number in (3, 12, 18, 100)]
    assert taken[:2] == pytest.approx([TARGET_S] * 2, rel=0.05)
    assert taken[2:] == pytest.approx([1.5 * TARGET_S, MOST_S], rel=0.1)
    assert run(budget, 5)[-1] == pytest.approx(TARGET_S, rel=0.05), "it is gone with the backlog"


def test_a_target_that_is_the_most_holds_whatever_waits():
    budget = TokenBudget(LIMIT, TARGET_S, TARGET_S)
    budget.observe(BASE_S, 0)
    run(budget, 20)
    assert budget.num_tokens(True, 0, 10**6) == budget.num_tokens(True, 0, 0)


def test_what_was_learnt_can_be_forgotten(budget):
    budget.forget()
    assert budget.num_tokens(is_decoding=True) == START_TOKENS and budget.token_s == 0.0


def test_a_budget_fills_a_pass_that_needs_no_padding():
    budget = TokenBudget(8192, 0.040, 0.1, [256, 512, 1024, 2048])
    assert budget.num_tokens(True, 30) == 1024 - 30  # of START_TOKENS and these
    assert budget.num_tokens(False, 30) == 8192
    for _ in range(20):
        budget.observe(0.005, 0)
        budget.observe(0.005 + 20e-6 * 1500, 1500)
    assert budget.num_tokens(True, 100) == 1024 - 100
    for _ in range(20):
        budget.observe(0.005 + 5e-6 * 6000, 6000)
    assert budget.num_tokens(True, 100) > 2048  # beyond them nothing is padded
