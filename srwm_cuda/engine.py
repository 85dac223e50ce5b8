"""ProcGen's engine, as the scripts use it."""

import ctypes
import sys
from pathlib import Path

if sys.version_info < (3, 13):
    import gym_notices.notices

    gym_notices.notices.notices.clear()  # or gym, which procgen imports, announces its retirement at every start
    from procgen import ProcgenGym3Env as _Engine
else:  # for which there is no procgen, but its engine, unchanged, in another package
    import procgen_gym

    class _Engine(procgen_gym.libenv.CLibenv):  # what is needed here of procgen's class
        def __init__(self, num, env_name, distribution_mode, render_mode=None, **options):
            data = Path(procgen_gym.__file__).parent / "data"
            options = dict(center_agent=True, use_backgrounds=True) | options | dict(
                env_name=env_name, distribution_mode=procgen_gym.env.DISTRIBUTION_MODE_DICT[distribution_mode],
                render_human=render_mode is not None, num_actions=15, resource_root=f"{data / 'assets'}/")
            super().__init__(str(data / "prebuilt"), num, options)

        def observe(self):
            self.call_c_func("libenv_observe")
            return self.get_reward_buf(), self.get_ob_bufs(), self.get_first_buf().view(bool)

        def get_info(self):
            self.observe()
            return [{name: values[n] for name, values in self.get_info_bufs().items()} for n in range(self.num)]

        def get_state(self):
            state = ctypes.create_string_buffer(2**20)
            return [state[: self.call_c_func("get_state", n, state, len(state))] for n in range(self.num)]


class ProcgenGym3Env(_Engine):
    """Environments in one vector, as procgen's class of this name makes them. `observe` returns the engine's own arrays.

    Args:
        num, env_name, options: as procgen takes them.
        frames: (num, 64, 64, 3) uint8, memory for the engine to draw into; it does so with gym3, the base of procgen.

    Raises:
        ValueError: the engine does not load.
    """

    def __init__(self, num, env_name, frames=None, **options):
        self._frames = frames
        try:
            super().__init__(num, env_name, **options)
        except OSError as error:  # the dynamic linker's
            raise ValueError(f"procgen does not load ({error}); on Debian: apt install libgl1 libglib2.0-0") from None
        self._reuse_arrays = True  # observe() returns the engine's own arrays: an option of gym3 that procgen hides

    def _numpy_aligned(self, shape, dtype, *rest):  # with which gym3 makes each array that the engine writes to
        if self._frames is not None and tuple(shape) == self._frames.shape:
            return self._frames
        return super()._numpy_aligned(shape, dtype, *rest)
