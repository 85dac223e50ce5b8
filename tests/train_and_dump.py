"""Run by torchrun in the tests: trains as the SRWM script does, and leaves each process's batch and weights in a file."""

import copy

import torch

import impala_procgen_srwm as script


class Learner(script.Learner):
    """Keeps what its first update began with, learned from, and led to."""

    first = None

    def update(self, stop=False):
        if self.first:
            return super().update(stop)
        before, batch = copy.deepcopy(self.agent.state_dict()), copy.deepcopy(vars(self.batch))
        result = super().update(stop)
        Learner.first = dict(before=before, batch=batch, after=copy.deepcopy(self.agent.state_dict()))
        return result


script.Learner = Learner
given, checkpoint = script.parse_args()
args, games = script.complete(given)
agent = script.make_agent(args, checkpoint)
script.train(given, args, games, agent, checkpoint, script.make_run(args))
torch.save(Learner.first | dict(last=agent.state_dict()), f"process{script.RANK}.pt")
