"""Run by torchrun in the tests: trains as the SRWM script does, and leaves each process's batch and weights in a file. The
second update is not finite in one process."""

import copy

import torch

import impala_procgen_srwm as script


class Learner(script.Learner):
    """Keeps what its first update began with, learned from, and led to."""

    first = second = None

    def fill(self, actors, version):
        Learner.seeds = [actor.generator.initial_seed() for actor in actors.actors]
        return super().fill(actors, version)

    def learned(self):
        return copy.deepcopy((self.agent.state_dict(), self.optimizer.state_dict()["state"]))

    def update(self, stop=False):
        if self.second:
            return super().update(stop)
        if self.first:
            if script.RANK == 1:
                self.batch.reward.fill_(float("nan"))
            before, result = self.learned(), super().update(stop)
            Learner.second = dict(skipped=(before, self.learned()))
            return result
        before, batch = copy.deepcopy(self.agent.state_dict()), copy.deepcopy(vars(self.batch))
        result = super().update(stop)
        Learner.first = dict(before=before, batch=batch, after=copy.deepcopy(self.agent.state_dict()))
        return result


script.Learner = Learner
given, checkpoint = script.parse_args()
args, games = script.complete(given)
args.num_actors = (3, 1)[script.RANK]  # as on machines with other numbers of cores
agent = script.make_agent(args, checkpoint)
for parameter in agent.parameters():
    parameter.data *= 1 + script.RANK / 1000  # as of a processor that rounds otherwise, though less
script.train(given, args, games, agent, checkpoint, script.make_run(args))
torch.save(Learner.first | Learner.second | dict(last=agent.state_dict(), seeds=Learner.seeds), f"process{script.RANK}.pt")
