"""The engine plays the same on every Python, whichever package it comes from."""

import hashlib
import sys

import numpy as np
import pytest

import impala_procgen_srwm as script

REWARDS_AND_EPISODES = "5cb8f949750934c8"
FRAMES = "835a9c853b51b8d4"
# Where sprites are turned or mirrored, two versions of Qt, which draws them, differ in less than one of a thousand bytes.
TURNED = ("coinrun", "bossfight", "caveflyer", "jumper", "ninja")
FRAMES_TURNED = {"procgen": "c88ba1181e96fadb", "procgen_gym": "520e7c99301baeb0"}


@pytest.fixture(scope="module")
def played():
    """Frames (150, 32, 64, 64, 3), rewards and dones (150, 32) of two environments of each game with random actions."""
    envs = script.make_envs(script.Args(), script.GAMES["easy"], 32, seed=7)
    random, steps = np.random.RandomState(0), []
    for _ in range(150):
        reward, obs, done = envs.observe()
        steps.append((obs["rgb"].copy(), reward.copy(), done.copy()))
        envs.act(random.randint(0, 15, 32).astype(np.int32))
    return [np.array(x) for x in zip(*steps)]


def digest(*arrays):
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


def test_rewards_and_episodes_are_the_same_bytes_on_every_python(played):
    _, reward, done = played
    assert reward.dtype == np.float32 and done.dtype == bool and done[1:].sum() > 10 and len(np.unique(reward)) > 2
    assert digest(reward, done) == REWARDS_AND_EPISODES


def test_frames_are_the_same_bytes_but_for_games_whose_sprites_turn(played):
    turned = np.array([game in TURNED for game in script.GAMES["easy"]] * 2)
    assert digest(played[0][:, ~turned]) == FRAMES
    assert digest(played[0][:, turned]) == FRAMES_TURNED["procgen" if sys.version_info < (3, 13) else "procgen_gym"]


def test_a_state_is_carried_from_one_engine_to_another(played):
    args = script.Args()
    first, second = (script.make_envs(args, ["maze", "leaper"], 2, seed=seed) for seed in (1, 2))
    for envs in (first, second):
        envs.act(np.full(2, 7, dtype=np.int32))
    for n, state in enumerate(first.get_state()):
        second.call_c_func("set_state", n, state, len(state))
    assert second.get_state() == first.get_state()
    np.testing.assert_array_equal(first.observe()[1]["rgb"], second.observe()[1]["rgb"])
