"""Weights on their way from a learner to those that act, and helpers of both: states, modes, an optimizer's averages."""

import torch


class Weights:
    """The newest parameters and buffers of an agent, in a ring of eight rows on its device. Nobody waits for anybody: a row is
    whole when it is published, and is written again only eight updates later. To copy one takes a small part of an update's
    time, so nobody reads half an update. No method waits for the device, and a CUDA graph can hold each. What gives an
    agent other tensors afterwards, as its `double()` does, takes them out of the ring.

    Attributes:
        version: the number of the newest, from 1 on, (1,) int32 on the device.
    """

    def __init__(self, agent):
        self.row, self.version = _into_row(agent)
        self.ring = self.row.new_zeros(8, len(self.row))
        self.slot = torch.zeros_like(self.version)  # the row of the newest
        self.publish()

    @torch.no_grad()
    def publish(self, valid=None):
        """Makes what the agent's tensors hold the newest. If `valid`, a tensor of one bool, is false, they become again what
        was published last."""
        if valid is not None:
            self.row.copy_(torch.where(valid, self.row, self.ring.index_select(0, self.slot)[0]))
        self.version += 1
        slot = self.version % 8
        self.ring.index_copy_(0, slot.long(), self.row.unsqueeze(0))
        self.slot.copy_(slot)

    @torch.no_grad()
    def restore(self):
        """Gives the agent what was published last."""
        self.row.copy_(self.ring.index_select(0, self.slot)[0])

    def attach(self, agent):
        """Gives another agent tensors to fetch to, and `version`, of what it has fetched."""
        agent.row, agent.version = _into_row(agent)
        self.fetch(agent)

    def fetch(self, agent):
        """Gives an attached agent what is the newest when its device comes to it."""
        if agent.row.is_cuda or agent.version.item() != self.version.item():
            slot = self.slot.clone()  # read once: blocks of a kernel begin one after the other
            torch.index_select(self.ring, 0, slot, out=agent.row.unsqueeze(0))


def _into_row(agent):
    """Moves an agent's parameters and buffers into one tensor. Returns that, and its last part, a version, (1,) int32."""
    tensors = [*agent.parameters(), *agent.buffers()]
    version = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
    return in_one([*tensors, version], version.device), version


@torch.no_grad()
def in_one(tensors, device):
    """Moves tensors of any type on a device into one of float32 numbers, of which each is a part from now on. Returns it."""
    sizes = [-(-x.nbytes // 256) * 64 for x in tensors]  # pieces of 256 bytes
    row = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
    for x, part in zip(tensors, row.split(sizes)):
        part = part.view(x.dtype).as_strided(x.shape, torch.empty_like(x).stride())  # dense, also of a slice
        part.copy_(x)
        x.data = part
    return row


@torch.no_grad()
def reset_diverged(state, bounds):
    """Zeroes the state of environments in which it is not finite or reaches a bound.

    Args:
        state: a tuple of tensors (B, ...); those of whole numbers are not looked at.
        bounds: a number, or one for each part of the state (math.inf: none), such as an agent's state_bound.

    Returns:
        The number of these environments, a tensor: nobody waits for it.
    """
    bounds = bounds if isinstance(bounds, (tuple, list)) else [bounds] * len(state)
    if len(bounds) != len(state):
        raise ValueError(f"state_bound must be a number, or one for each of {len(state)} parts, got {bounds}")
    diverged = [~(part.abs().reshape(len(part), -1) < bound).all(1)  # (B,) each; nan is not less either
                for part, bound in zip(state, bounds) if part.is_floating_point() or part.is_complex()]
    if not diverged:
        return torch.zeros(())
    diverged = torch.stack(diverged).any(0)
    for part in state:
        part.masked_fill_(diverged.view(-1, *[1] * (part.ndim - 1)), 0)
    return diverged.sum()


def prepare_optimizer(optimizer, saved=None):
    """Lets an optimizer make its averages, by a step at learning rate zero: a CUDA graph cannot make them. They become those
    of a state_dict(), `saved`, or else zeros. Hyperparameters stay.

    Returns:
        One tensor of which all averages are parts, so that to keep and bring them back takes a copy each.
    """
    groups = optimizer.param_groups
    parameters, rates = [x for group in groups for x in group["params"]], [group["lr"] for group in groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in groups:
        group["lr"] = 0 * group["lr"]
    optimizer.step()
    for group, rate in zip(groups, rates):
        group["lr"] = rate
    for index, parameter in enumerate(parameters):
        before = saved["state"].get(index, {}) if saved else {}
        for name, average in optimizer.state[parameter].items():  # all tensors, as of a capturable one
            average.copy_(before.get(name, torch.zeros_like(average)))
    averages = [average for parameter in parameters for average in optimizer.state[parameter].values()]
    device = parameters[0].device  # on a CPU beside it: how many steps, where the optimizer is not capturable
    return in_one([average for average in averages if average.device == device], device)


@torch.no_grad()
def acting_logits(agent, *inputs):
    """The policy as actors compute it: without dropout, with BatchNorm's averages. The agent is in training mode after it."""
    logits, _, _ = agent.eval()(*inputs)
    agent.train()
    return logits


@torch.no_grad()
def try_both_modes(agent, obs, reward, done, state):
    """Whether an agent's policy in training is another than in evaluation, as with BatchNorm or dropout.

    To find out, it writes to parameters, buffers and obs; Weights.restore() brings back the first two.
    """
    obs.random_(0, 256)
    torch._foreach_add_([x.data for x in agent.parameters()], 1e-3)  # or what starts at zero would hide a difference
    inputs = obs[:2], reward[:2], done[:2], state  # 2: BatchNorm needs more than one row
    acting, (training, _, _) = acting_logits(agent, *inputs), agent(*inputs)
    return not torch.allclose(acting, training, 1e-3, 1e-4)
