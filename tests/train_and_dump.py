"""Run by torchrun in the tests: trains as the SRWM script does, and leaves each process's batch and weights in a file. The
second update is not finite in one process."""

import copy
import os

import torch

import impala_procgen_srwm as script


class Learner(script.Learner):
    """Keeps what its first update began with, learned from, and led to."""

    first = second = None

    def fill(self, pool):
        Learner.seeds = [actor.generator.initial_seed() for actor in pool.actors]
        return super().fill(pool)

    def learned(self):
        return copy.deepcopy((self.agent.state_dict(), self.optimizer.state_dict()["state"]))

    def update(self, *words):
        if self.second:
            return super().update(*words)
        if self.first:
            if script.RANK == 1:
                self.batch.reward.fill_(float("nan"))
            before, result = self.learned(), super().update(*words)
            Learner.second = dict(skipped=(before, self.learned()))
            return result
        before, batch = copy.deepcopy(self.agent.state_dict()), copy.deepcopy(vars(self.batch))
        result = super().update(*words)
        Learner.first = dict(before=before, batch=batch, after=copy.deepcopy(self.agent.state_dict()))
        return result


def resolve(given):
    args, games = resolve_args(given)
    args.num_actors = (3, 1)[script.RANK]  # as on machines with other numbers of cores
    return args, games


resolve_args, script.resolve_args = script.resolve_args, resolve
script.Learner = Learner
launch = script.Launch()
run = script.Run(launch, *script.parse_args(launch))
for parameter in run.agent.parameters():
    parameter.data *= 1 + script.RANK / 1000  # as of a processor that rounds otherwise, though less
script.train(run, script.Stop())
seeds = dict(seeds=Learner.seeds, engine_seeds=list(range(run.seed, run.engine.next_seed)))
seeds |= dict(cores=os.sched_getaffinity(0), num_cores=script.num_cores())
torch.save(Learner.first | Learner.second | seeds | dict(last=run.agent.state_dict()), f"process{script.RANK}.pt")
