"""The engine: what the project relies on, and what docs/engine.md says of it."""

import functools
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import impala_procgen_srwm as script
from benchmarks import blind
from housekeeping import engine
from housekeeping.engine import GAMES

ARGS, SIX = script.Args(), GAMES["easy"][:6]
REWARDS_AND_EPISODES = "5cb8f949750934c8"
FRAMES = "47faacec0491cb12"
# Games that two versions of Qt draw differently, somewhere: the one of procgen-mirror, and that of procgen-gym, whose
# frames are those of OpenAI's own package. A level whose first frame shows it, and the digest of that frame with each.
DRAWN_DIFFERENTLY = {
    "coinrun": (0, "a2f2e158848de642", "3d12dc440f0d16a9"), "ninja": (10, "b72dc47f7e43feaa", "d792a82eadcc2092"),
    "caveflyer": (53, "0fdfcdf2e43993a2", "965027edf014b0c7"), "climber": (3, "79136949f08b70a3", "10a68adeb874b8fc"),
    "bossfight": (18, "9bad12cbc6ad4cdd", "d1707785a66b87c6"), "jumper": (58, "4b78d34234a032ef", "a14bfcde41d3e806"),
    "miner": (146, "b032c6788123815f", "3a01f074eaf606bd")}
TESTS = (1000, 1200, 1400)  # first levels of the paper's test splits
RESULTS = Path(__file__).parent.parent / "docs/results.md"
EIGHT_WAYS = [[0], [1], [2], [3], [4, 9, 10, 11, 12, 13, 14], [5], [6], [7], [8]]
FOUR_WAYS = [[0, 1, 2], [3], [4, 9, 10, 11, 12, 13, 14], [5], [6, 7, 8]]
TO_THE_SIDES = [[0, 1, 2], [3, 4, 5, 10, 11, 12, 13, 14], [6, 7, 8], [9]]
WITH_A_KEY = [[0], [1], [2], [3], [4, 10, 11, 12, 13, 14], [5], [6], [7], [8], [9]]
JUMPING = [[0, 1], [2], [3, 4, 9, 10, 11, 12, 13, 14], [5], [6, 7], [8]]
DO_THE_SAME = {  # groups of actions that do the same, as docs/engine.md counts them
    "bigfish": EIGHT_WAYS, "fruitbot": TO_THE_SIDES, "maze": FOUR_WAYS, "leaper": FOUR_WAYS, "plunder": TO_THE_SIDES,
    "starpilot": [[0], [1], [2], [3], [4], [5], [6], [7], [8], [9, 11, 12, 13, 14], [10]],
    "miner": FOUR_WAYS, "bossfight": WITH_A_KEY, "caveflyer": WITH_A_KEY, "chaser": EIGHT_WAYS, "climber": JUMPING,
    "coinrun": EIGHT_WAYS, "dodgeball": WITH_A_KEY, "heist": EIGHT_WAYS, "jumper": JUMPING,
    "ninja": [[0, 1], [2], [3, 4], [5], [6, 7], [8], [9, 13, 14], [10], [11], [12]]}
SLOW_BEYOND_SIX = [pytest.param(game, marks=() if game in SIX else pytest.mark.slow) for game in GAMES["easy"]]
# Test levels of maze, and the training levels that they are. (Levels 0 to 199 are trained on, 1000 to 1599 are tests.)
SAME_MAZES = {1008: 103, 1010: 72, 1022: 45, 1026: 72, 1029: 45, 1034: 43, 1109: 134, 1119: 196, 1123: 14, 1178: 196,
              1201: 72, 1352: 14, 1417: 134, 1533: 17, 1565: 70}
LIMITS = {"bigfish": 6000, "bossfight": 4000, "plunder": 4000, "maze": 500, "leaper": 500}  # steps; else 1,000


@pytest.fixture(autouse=True, scope="module")
def library_is_opened_once():
    """As in evaluate.py. While cffi opens one it holds a lock, for which an engine that is thrown away would wait."""
    if ffi := getattr(make("maze"), "_ffi", None):
        ffi.dlopen = functools.cache(ffi.dlopen)


def make(game, num=1, mode="easy", levels=200, start=0, seed=0, **options):
    args = replace(ARGS, distribution_mode=mode, num_levels=levels, start_level=start)
    return script.make_envs(args, game if isinstance(game, list) else [game], num, seed, **options)


def each_level(game, levels, mode="easy"):
    """A vector in which environment n knows level levels[n] and no other, and has not moved yet."""
    envs = make(game, len(levels), mode, levels=1)
    for n, level in enumerate(levels):
        put(envs, n, make(game, mode=mode, levels=1, start=level).get_state()[0])
    return envs


def put(envs, n, state):
    envs.call_c_func("set_state", n, state, len(state))


def step(envs, *actions):
    """Takes an action in each environment. Returns rewards, frames and dones."""
    envs.act(np.array(np.broadcast_to(actions, envs.num), dtype=np.int32))
    return look(envs)


def look(envs):
    reward, obs, done = envs.observe()
    return reward.copy(), obs["rgb"].copy(), done.copy()


def level_seeds(envs):
    return [int(info["level_seed"]) for info in envs.get_info()]


def digest(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


@pytest.fixture(scope="module")
def played():
    """Frames (150, 32, 64, 64, 3), rewards and dones (150, 32) of two environments of each game with random actions."""
    envs = make(GAMES["easy"], 32, seed=7)
    random, steps = np.random.RandomState(0), []
    for _ in range(150):
        steps.append(look(envs))
        envs.act(random.randint(0, 15, 32).astype(np.int32))
    return [np.array(x) for x in zip(*steps)]


def test_episodes_begin_with_as_many_idle_steps_as_are_drawn_and_then_every_action_counts():
    """Each number from 0 to the most, about as often as any other; in bigfish, whose most is 0, none."""
    envs, taken, firsts = make(["fruitbot", "bigfish"], 64, seed=3), [], []
    act, envs.act = envs.act, lambda actions: taken.append(actions.copy()) or act(actions)
    starts = engine.NoopStarts(envs, [5, 0] * 32, seed=1)
    for _ in range(400):
        firsts.append(starts.observe()[2].copy())
        starts.act(np.full(64, 7))  # right
    counts, firsts, taken = np.zeros((64, 6), int), np.array(firsts), np.array(taken)
    for n in range(64):
        begins = np.flatnonzero(firsts[:, n])
        for begin, end in zip(begins, begins[1:]):
            actions = taken[begin:end, n]
            idle = int((actions == engine.NOOP).sum())
            assert (actions == [engine.NOOP] * idle + [7] * (len(actions) - idle)).all()
            counts[n, idle] += 1
    assert counts[1::2, 0].sum() == counts[1::2].sum() > 0
    counts, total = counts[::2], counts[::2].sum(0)
    assert total.min() > 0 and ((total - total.mean()) ** 2 / total.mean()).sum() < 20.5  # one in a thousand
    assert ((counts > 0).sum(1) > 1).all()  # drawn anew for each episode


def test_rewards_and_episodes_are_the_same_bytes_on_every_python(played):
    reward, _, done = played
    assert reward.dtype == np.float32 and done.dtype == bool and done[1:].sum() > 10 and len(np.unique(reward)) > 2
    assert digest(reward, done) == REWARDS_AND_EPISODES


def test_frames_are_the_same_bytes_on_every_python_but_for_games_that_qt_draws_differently(played):
    same = np.array([game not in DRAWN_DIFFERENTLY for game in GAMES["easy"]] * 2)
    assert not set(SIX) & set(DRAWN_DIFFERENTLY)
    assert digest(played[1][:, same]) == FRAMES


@pytest.mark.parametrize("game", DRAWN_DIFFERENTLY)
def test_which_qt_has_drawn_a_frame_shows(game):
    level, mirror, original = DRAWN_DIFFERENTLY[game]
    assert digest(look(make(game, levels=1, start=level))[1]) == (mirror if sys.version_info < (3, 13) else original)


def test_a_state_is_carried_from_one_engine_to_another():
    first, second = (make(["maze", "leaper"], 2, seed=seed) for seed in (1, 2))
    for envs in (first, second):
        envs.act(np.full(2, 7, dtype=np.int32))
    for n, state in enumerate(first.get_state()):
        put(second, n, state)
    assert second.get_state() == first.get_state()
    np.testing.assert_array_equal(first.observe()[1]["rgb"], second.observe()[1]["rgb"])


@pytest.mark.slow
@pytest.mark.parametrize("mode", GAMES)
def test_an_episode_goes_on_the_same_in_an_engine_that_its_state_is_carried_to(mode):
    for game in GAMES[mode]:
        first, second = (make(game, 4, mode, seed=seed) for seed in (1, 99))
        random = np.random.RandomState(0)
        for _ in range(60):
            step(first, *random.randint(0, 15, 4))
        for n, state in enumerate(first.get_state()):
            put(second, n, state)
        for _ in range(60):
            actions = random.randint(0, 15, 4)
            assert all(map(np.array_equal, step(first, *actions), step(second, *actions))), game


def test_a_state_brings_its_distribution_mode_and_its_levels():
    """So evaluate.py can give an environment a level that its engine was not made for."""
    hard, easy = make("maze", mode="hard", levels=3, start=700, seed=1), make("maze", levels=200, seed=2)
    put(easy, 0, hard.get_state()[0])
    random, levels = np.random.RandomState(0), set()
    for n in range(200):
        action = -1 if n % 25 == 24 else random.randint(0, 9)  # -1 ends an episode
        for one, other in zip(step(hard, action), step(easy, action)):
            np.testing.assert_array_equal(one, other)
        levels |= {*level_seeds(easy), *level_seeds(hard)}
    assert len(levels) > 1 and levels <= {700, 701, 702}


@pytest.mark.parametrize("options", [
    dict(game="bigfish"), dict(game="leaper", mode="hard"), dict(game="maze", mode="memory"),
    dict(game="fruitbot", num_threads=4), dict(game=SIX)], ids=str)
def test_the_first_levels_depend_on_the_seed_and_the_number_of_the_environment_alone(options):
    assert level_seeds(make(num=6, seed=7, **options)) == [143, 93, 178, 63, 187, 61]


def test_levels_are_drawn_modulo_their_number():
    drawn = np.array(level_seeds(make("maze", 6, levels=1000, seed=7)))
    assert drawn.max() >= 500
    for levels, start in ((200, 0), (500, 0), (200, 1000)):
        assert level_seeds(make("maze", 6, levels=levels, start=start, seed=7)) == (start + drawn % levels).tolist()


def test_a_first_level_is_ignored_where_all_levels_are_played():
    assert level_seeds(make("maze", 6, levels=0, start=1000)) == level_seeds(make("maze", 6, levels=0))


def test_seeds_one_apart_do_not_share_a_row_of_levels():
    """The vectors of a run have such seeds. Of 2**31 levels, no two environments begin with the same one."""
    first = [level for seed in range(1000, 1040) for level in level_seeds(make("maze", 24, levels=0, seed=seed))]
    assert len(set(first)) == len(first) == 960


def outcomes(game, rounds, steps):
    """For 8 states of each round of random play, and each action: what is seen of it and of random ones after it."""
    random, probe, envs = np.random.RandomState(0), make(game, 15), make(game, 8, levels=0, seed=1)
    for _ in range(rounds):
        for _ in range(25):
            step(envs, *random.randint(0, 15, 8))
        for state in envs.get_state():
            for n in range(15):
                put(probe, n, state)
            seen, over = [b""] * 15, np.zeros(15, dtype=bool)
            for actions in ([*range(15)], *random.randint(0, 15, steps)):
                reward, frames, done = step(probe, *np.atleast_1d(actions))
                for n in np.flatnonzero(~over):
                    seen[n] += b"%g" % reward[n] + (b"end" if done[n] else frames[n].tobytes())
                over |= done
            yield seen


@pytest.mark.parametrize("game", SLOW_BEYOND_SIX)
def test_actions_that_do_the_same(game):
    groups, seen = DO_THE_SAME[game], [*zip(*outcomes(game, 4 if game in SIX else 24, 6))]
    assert sorted(n for group in groups for n in group) == [*range(15)]
    assert all(seen[n] == seen[group[0]] for group in groups for n in group)
    assert len({seen[group[0]] for group in groups}) == len(groups)


@pytest.mark.slow
def test_in_leaper_no_action_matters_in_most_states_of_random_play():
    """But in other games nearly always. In mazes three actions differ on average, the others walk into walls."""
    different = {game: [len(set(seen)) for seen in outcomes(game, 25, 6)] for game in SIX}
    nothing_matters = {game: np.mean(np.array(counts) == 1) for game, counts in different.items()}
    assert 0.65 < nothing_matters.pop("leaper") < 0.8 and max(nothing_matters.values()) <= 0.01
    assert 2.5 < np.mean(different["maze"]) < 3.5


def test_in_leaper_the_five_actions_after_a_jump_has_begun_do_nothing():
    state, envs, outcomes = make("leaper", levels=1, start=30).get_state()[0], make("leaper", 15), []
    for waited in range(7):
        for n in range(15):
            put(envs, n, state)
        for action in (5, *[4] * waited):
            step(envs, action)
        step(envs, *range(15))
        outcomes.append(len({frame.tobytes() for frame in step(envs, 4)[1]}))
    assert outcomes == [1, 1, 1, 1, 1, 5, 5]


@pytest.mark.parametrize("mode", ["easy", "hard"])
def test_in_plunder_shots_and_what_they_hit_make_an_episode_longer_or_shorter(mode):
    """One shot in step 150 of each level, or none: a full bar lasts 667 steps."""
    levels = range(60)
    for shot, lengths in (None, {(0, 667)}), (150, {(0, 667 - 13), (0, 667 - 13 - 67), (1, 667 - 13 + 66)}):
        envs, total, length, delays = each_level("plunder", levels, mode), np.zeros(60), np.zeros(60, dtype=int), set()
        for t in range(800):
            reward, _, done = step(envs, 9 if t == shot else 4)
            going = length == 0
            total += reward * going
            delays |= {t - shot} if shot and (reward * going).any() else set()
            length[going & done] = t + 1
        assert set(zip(total, length)) == lengths and delays <= set(range(11, 17))
        assert bool(delays) == bool(shot)


@pytest.mark.slow
@pytest.mark.parametrize("fires, returns, steps", [
    (0.02, 2.6, 536), (0.07, 4.4, 373), (0.15, 4.3, 270), (0.25, 3.5, 210), (0.5, 2.3, 155), (1, 1.7, 125)])
def test_in_plunder_random_play_earns_most_with_few_shots(fires, returns, steps):
    envs, random = make("plunder", 64), np.random.RandomState(0)
    total, length, ended = np.zeros(64), np.zeros(64, dtype=int), []
    for _ in range(3000):
        moves = random.choice([1, 4, 7], 64)
        reward, _, done = step(envs, *np.where(random.random_sample(64) < fires, 9, moves))
        total, length = total + reward, length + 1
        ended += zip(total[done], length[done])
        total[done], length[done] = 0, 0
    earned, lasted = np.mean(ended, axis=0)  # as docs/engine.md says
    assert (round(earned, 1), round(lasted)) == (returns, steps)


def test_a_time_limit_looks_like_a_death():
    envs = make("maze", levels=1)
    ends = [step(envs, 4)[2][0] for _ in range(LIMITS["maze"])]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert not look(envs)[0].any() and not envs.get_info()[0]["prev_level_complete"]


@pytest.mark.parametrize("mode", GAMES)
def test_time_limits(mode):
    for game in GAMES[mode]:
        limit = 2000 if (game, mode) == ("jumper", "memory") else LIMITS.get(game, 1000)
        assert time_limit(make(game, mode=mode).get_state()[0]) == limit, game


def time_limit(state):
    """It stands in a state after a name, 17 numbers, two random generators, reward, done, level complete and action."""
    at = 8 + int.from_bytes(state[4:8], "little") + 17 * 4
    for _ in range(2):
        at += 8 + int.from_bytes(state[at + 4 : at + 8], "little")
    return int.from_bytes(state[at + 16 : at + 20], "little")


def ends_at_limits(game, mode, levels, choose):
    """The share of levels whose episode ends at the time limit, if `choose` gives the actions."""
    envs, ended = each_level(game, levels, mode), np.zeros(len(levels), dtype=bool)
    for _ in range(time_limit(envs.get_state()[0]) - 1):
        ended |= step(envs, *choose(len(levels)))[2]
        if ended.all():
            break
    return 1 - ended.mean()


@pytest.mark.slow
def test_the_share_of_random_play_s_episodes_that_end_at_time_limits():
    random = np.random.RandomState(0)
    share = {(game, mode): ends_at_limits(game, mode, range(100), lambda num: random.randint(0, 15, num))
             for mode, games in (("easy", SIX), ("memory", GAMES["memory"])) for game in games}
    assert {which: round(100 * value) for which, value in share.items() if value} == {
        ("maze", "easy"): 54, ("leaper", "easy"): 3, ("heist", "memory"): 89, ("jumper", "memory"): 89,
        ("maze", "memory"): 67, ("miner", "memory"): 12, ("caveflyer", "memory"): 11, ("dodgeball", "memory"): 3}


@pytest.mark.slow
def test_games_whose_every_episode_of_doing_nothing_ends_at_the_time_limit():
    short = [game for game in GAMES["easy"] if game not in ("bigfish", "bossfight", "plunder")]
    always = {game for game in short if ends_at_limits(game, "easy", range(30), lambda num: [4] * num) == 1}
    assert always == {"maze", "leaper", "miner", "climber", "coinrun", "heist", "ninja"}


def test_in_miner_the_exit_is_open_at_the_first_step_of_a_fresh_engine_alone():
    """Level 5 has its exit above the place where it begins. Diamonds are counted at the end of a step."""
    envs = make("miner", levels=1, start=5)
    reward, _, done = step(envs, 5)
    assert reward[0] == 10 and done[0]
    reward, _, done = step(envs, 5)  # the same level once more
    assert reward[0] == 0 and not done[0]


@pytest.mark.slow
@pytest.mark.parametrize("levels, by_moving, by_nothing, in_all", [
    (range(200), 13, 2, 15), (range(1000, 1600), 19, 8, 25)], ids=str)
def test_levels_of_miner_that_can_be_completed_at_the_first_step(levels, by_moving, by_nothing, in_all):
    envs, completed = each_level("miner", list(levels)), []
    states = envs.get_state()
    for action in (0, 3, 4, 5, 6):  # left, down, nothing, up, right
        for n, state in enumerate(states):
            put(envs, n, state)
        completed.append(step(envs, action)[0] >= 10)
    still = completed.pop(2)
    moving = np.any(completed, axis=0)
    assert (moving.sum(), still.sum(), (moving | still).sum()) == (by_moving, by_nothing, in_all)


def test_in_fruitbot_the_last_step_gives_10_or_20():
    """A state goes on after what `time_limit` skips with 12 words, the number of things, and x and y of the robot."""
    rewards = []
    for level in range(20):
        envs = make("fruitbot", levels=1, start=level)
        state, at = bytearray(envs.get_state()[0]), 8 + len("fruitbot") + 17 * 4
        for _ in range(2):
            at += 8 + int.from_bytes(state[at + 4 : at + 8], "little")
        state[at + 72 : at + 76] = np.float32(57.9).tobytes()  # just below the presents
        put(envs, 0, bytes(state))
        done = False
        while not done:
            (reward,), _, (done,) = step(envs, 4)
        rewards.append(float(reward))
    assert set(rewards) == {10, 20} and rewards.count(20) > rewards.count(10)


def test_easy_and_hard_mode_begin_with_the_same_frame_in_two_games():
    first = {(game, mode): [digest(look(make(game, mode=mode, levels=1, start=level))[1]) for level in range(5)]
             for mode in ("easy", "hard", "extreme") for game in GAMES[mode]}
    same = {game for game in GAMES["easy"] if first[game, "easy"] == first[game, "hard"]}
    assert same == {"bossfight", "starpilot"} and first["starpilot", "easy"] == first["starpilot", "extreme"]


def test_in_dodgeball_the_first_throw_goes_where_the_episode_before_looked():
    def throw(envs):
        return [step(envs, action)[1] for action in (9, 4, 4, 4)]

    fresh, after = throw(make("dodgeball", levels=1, start=3)), make("dodgeball", levels=1, start=3)
    step(after, 1)  # left; a fresh engine looks to the right
    while not step(after, 4)[2][0]:
        pass
    np.testing.assert_array_equal(look(after)[1], look(make("dodgeball", levels=1, start=3))[1])
    assert not np.array_equal(throw(after), fresh)


@pytest.mark.parametrize("game", sorted({*GAMES["easy"]} - {"miner", "dodgeball"}))
def test_but_for_miner_and_dodgeball_an_episode_does_not_depend_on_the_one_before(game):
    fresh, after = (each_level(game, range(12)) for _ in range(2))
    random = np.random.RandomState(0)
    for _ in range(40):
        step(after, *random.randint(0, 15, 12))
    assert step(after, -1)[2].all()
    for _ in range(60):
        actions = random.randint(0, 15, 12)
        one, other = step(fresh, *actions), step(after, *actions)
        assert all(map(np.array_equal, one, other))


@pytest.mark.parametrize("game", SIX)
def test_a_level_is_the_same_alone_and_among_others(game):
    alone, among, random = make(game, levels=1, start=7), make(game, levels=20, seed=3), np.random.RandomState(0)
    while level_seeds(among) != [7]:
        step(among, -1)
    np.testing.assert_array_equal(look(alone)[1], look(among)[1])
    for _ in range(60):
        action, number = random.randint(0, 15), level_seeds(among)
        reward, frame, done = step(alone, action)
        same_reward, same_frame, same_done = step(among, action)
        assert number == [7] and reward == same_reward and done == same_done
        if done:
            break
        np.testing.assert_array_equal(frame, same_frame)


def test_mazes_of_the_test_levels_that_are_training_levels():
    """Whoever walks in them sees the same to the end."""
    tests, trained = each_level("maze", list(SAME_MAZES)), each_level("maze", list(SAME_MAZES.values()))
    random, over = np.random.RandomState(0), np.zeros(tests.num, dtype=bool)
    np.testing.assert_array_equal(look(tests)[1], look(trained)[1])
    while not over.all():
        actions = random.choice([1, 3, 5, 7], tests.num)
        reward, frames, done = step(tests, *actions)
        same_reward, same_frames, same_done = step(trained, *actions)
        going = ~over & ~done
        assert np.array_equal(reward[~over], same_reward[~over]) and np.array_equal(done[~over], same_done[~over])
        assert np.array_equal(frames[going], same_frames[going])
        over |= done


def test_the_scores_of_maze_without_the_test_levels_that_are_training_levels():
    """As docs/results.md gives them: the mean of the seeds, over 600 levels and over those that are left."""
    def scores(runs, sampled):
        returns = np.concatenate([[json.loads(file.read_text())["games"]["maze"]["returns"] for file in sorted(
            RESULTS.parent.parent.glob(f"results/{runs}__*/evaluation_easy_{first}_200{sampled}.json"))]
            for first in TESTS], axis=1)
        assert returns.shape == (3, 600)
        return np.delete(returns, np.array([*SAME_MAZES]) - 1000, axis=1).mean(), returns.mean()

    said = " ".join(RESULTS.read_text().split())
    assert "scores {:.2f} instead of {:.2f} with greedy actions".format(*scores("recipe", "")) in said
    assert "{:.2f} instead of {:.2f} with sampled ones".format(*scores("recipe", "_sampled_1")) in said
    assert "the paper's settings {:.2f} instead of {:.2f}.".format(*scores("srwm", "")) in said


def test_leaper_s_score_is_the_share_of_levels_with_at_most_one_lane_of_cars():
    """What docs/results.md says of the recipe's five agents. A state ends with the row of the goal, and a last word."""
    rows = [int.from_bytes(make("leaper", levels=1, start=n).get_state()[0][-8:-4], "little") for n in range(200)]
    lanes = (np.array(rows) - 3) // 2
    files = list((Path(__file__).parent.parent / "results").glob("recipe_*/evaluation_easy_0_200.json"))
    solved = np.array([json.loads(file.read_text())["games"]["leaper"]["returns"] for file in files]) > 0
    assert np.bincount(lanes).tolist() == [53, 39, 58, 50] and len(solved) == 5
    assert solved[:, lanes <= 1].all() and solved[:, lanes > 1].mean() < 0.02
    assert solved.all(axis=0).sum() == 92 and (~solved.any(axis=0)).sum() == 100


def test_the_recipe_s_agents_fail_on_the_same_levels():
    """What docs/results.md says of them. The third number of a level's Mersenne Twister is the size of its maze."""
    def returns(splits):  # (agents, games, levels)
        runs = sorted(path for path in RESULTS.parent.parent.glob("results/recipe_*") if path.is_dir())
        files = [[run / f"evaluation_easy_{first}_200.json" for run in runs] for first in splits]
        played = [[json.loads(file.read_text())["games"] for file in split] for split in files]
        return np.concatenate([[[games[game]["returns"] for game in SIX] for games in split] for split in played], 2)

    said = RESULTS.read_text()
    for name, splits in (("training", [0]), ("test", TESTS)):
        pairs = [np.corrcoef(scores)[np.triu_indices(5, 1)].mean() for scores in returns(splits).transpose(1, 0, 2)]
        assert f"| {name} levels | " + " | ".join(f"{pair:.2f}" for pair in pairs) + " |" in said
    solved = returns(TESTS)[:, SIX.index("maze")] > 0
    width = np.array([np.random.RandomState(n).randint(0, 2**32, 3, dtype=np.uint32)[2] % 7 for n in range(1000, 1600)])
    rates = [(solved[:, width == each].mean(axis=1), (width == each).sum()) for each in range(7)]
    none = sum((1 - rate).prod() * count for rate, count in rates)
    every = sum(rate.prod() * count for rate, count in rates)
    assert ((~solved).all(axis=0).sum(), solved.all(axis=0).sum(), round(none), round(every)) == (239, 156, 111, 59)


def test_a_fifth_of_the_mazes_of_memory_mode_are_smaller_than_the_view():
    """It shows eight cells. A state of maze ends with the widths of maze and world, and a last word."""
    states = [make("maze", mode="memory", levels=1, start=n).get_state()[0] for n in range(500)]
    widths = np.array([int.from_bytes(state[-12:-8], "little") for state in states])
    assert sorted(set(widths)) == [*range(3, 32, 2)] and (widths <= 7).sum() == 107


def test_a_blind_policy_s_score_is_that_of_the_table_in_the_results():
    assert blind.play("maze", 0, blind.NOTHING) == (0, LIMITS["maze"])
    returns = [blind.play("leaper", level, blind.ACTIONS.index("up"))[0] for level in range(200)]
    (row,) = [line for line in RESULTS.read_text().splitlines() if line.startswith("| leaper |") and "| up |" in line]
    assert f"| up | {np.mean(returns):.2f} (" in row


@pytest.mark.slow
@pytest.mark.parametrize("game", GAMES["easy"])
def test_first_frames_of_test_levels_that_are_those_of_training_levels(game):
    first = [digest(look(make(game, levels=1, start=level))[1]) for level in (*range(200), *range(1000, 1600))]
    repeated = [level for level, frame in enumerate(first[200:], 1000) if frame in set(first[:200])]
    count = {"ninja": 26, "maze": 15, "coinrun": 5, "leaper": 2, "bigfish": 1}.get(game, 0)
    assert len(repeated) == count and (game != "maze" or repeated == list(SAME_MAZES))
    assert len(set(first[:200])) == {"maze": 196, "ninja": 194, "coinrun": 199}.get(game, 200)
    if game in ("ninja", "coinrun", "leaper", "bigfish"):  # what comes into view differs, but for one of leaper's
        tests, trained = each_level(game, repeated), each_level(game, [first.index(first[n - 800]) for n in repeated])
        random, differ = np.random.RandomState(0), np.zeros(count, dtype=bool)
        for _ in range(300):
            actions = random.choice([5, 7, 8], count)  # up and to the right
            one, other = step(tests, *actions)[1], step(trained, *actions)[1]
            differ |= (one != other).any(axis=(1, 2, 3))
        assert differ.tolist() == ([True, False] if game == "leaper" else [True] * count)
