"""Two linear-recurrent layers, written small: a diagonal state space (DSS, arXiv 2203.14343; initialised as
S4D-Lin, arXiv 2206.11893) and retention (RetNet, arXiv 2307.08621).

Each is computed in two ways that give the same: over the whole sequence at once, in which it trains, and
token by token with a state of fixed size, which is what separates it from attention. B batch, T tokens, W
width, S states of a channel, H heads, D head width.

Departures: the state space has one parameter C in place of B and C, whose product alone matters; its steps
begin larger, for sequences of tens of tokens. Retention has no normalisation of its scores, because the norm
of each head undoes any scale, and that norm has no weights.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .rope import rotate


class DiagonalStateSpace(nn.Module):
    """For each channel by itself, with u its inputs and decay_s = exp(step A_s), |decay_s| < 1:

        state_s[t] = decay_s state_s[t - 1] + u[t]
        y[t] = Re sum_s C_s (decay_s - 1) / A_s state_s[t] + D u[t]

    A_s = -exp(log_rate) + i frequency begins at -1/2 + i pi s. Then GELU and a linear layer mix the channels.
    """

    def __init__(self, width, num_states=8):
        super().__init__()
        def per_state(value):
            return nn.Parameter(value.expand(width, num_states).clone())            # (W, S)
        self.log_rate = per_state(torch.tensor(math.log(0.5)))
        self.frequency = per_state(math.pi * torch.arange(num_states).float())
        low, high = math.log(0.01), math.log(1.0)
        self.log_step = nn.Parameter(low + (high - low) * torch.rand(width))        # (W,)
        self.C = nn.Parameter(torch.randn(width, num_states, 2) / num_states ** 0.5)    # real, imaginary
        self.D = nn.Parameter(torch.randn(width))
        self.mix = nn.Linear(width, width)

    def discrete(self):
        """(log of the decay (W, S), what a state counts for in the output (W, S)), complex."""
        A = torch.complex(-self.log_rate.exp(), self.frequency)
        log_decay = self.log_step.exp()[:, None] * A
        return log_decay, torch.view_as_complex(self.C) * (log_decay.exp() - 1) / A

    def kernel(self, num_tokens):
        """(W, T): what an input counts for after 0, 1, ... tokens."""
        log_decay, weight = self.discrete()
        powers = (log_decay[..., None] * torch.arange(num_tokens)).exp()            # (W, S, T)
        return (weight[..., None] * powers).sum(1).real

    def convolved(self, u):
        """y of the equation for the inputs u (B, T, W), as a causal convolution."""
        T = u.shape[1]
        spectrum = torch.fft.rfft(u, 2 * T, 1) * torch.fft.rfft(self.kernel(T).T, 2 * T, 0)
        return torch.fft.irfft(spectrum, 2 * T, 1)[:, :T] + self.D * u

    def step(self, u, state):
        """One token's inputs u (B, W) and the state (B, W, S) before it -> (y (B, W), the state after it)."""
        log_decay, weight = self.discrete()
        state = log_decay.exp() * state + u[..., None]
        return (weight * state).sum(-1).real + self.D * u, state

    def first_state(self, u):
        return torch.zeros(*u.shape, self.log_rate.shape[1], dtype=torch.complex64)

    def forward(self, x):
        return self.mix(F.gelu(self.convolved(x)))


class Retention(nn.Module):
    """Multi-scale retention: attention without softmax, whose scores fade with the distance by gamma_h:

        y[n] = q[n] sum_{m <= n} gamma^(n - m) k[m]^T v[m]
        S[n] = gamma S[n - 1] + k[n]^T v[n],    y[n] = q[n] S[n]

    Queries and keys are rotated by their positions. gamma_h = 1 - 2^(-5 - h).
    """

    def __init__(self, width, num_heads):
        super().__init__()
        self.H, self.D = num_heads, width // num_heads
        assert width % num_heads == 0 and self.D % 2 == 0, (width, num_heads)
        self.qkvg = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.register_buffer("gamma", 1 - 2.0 ** (-5 - torch.arange(num_heads).float()))     # (H,)

    def heads(self, x, first=0):
        """x (B, T, W), whose first token stands at place `first` -> q, k, v (B, H, T, D) and the gate (B, T,
        W)."""
        q, k, v, gate = self.qkvg(x).chunk(4, -1)
        q, k, v = (each.unflatten(-1, (self.H, self.D)) for each in (q, k, v))      # (B, T, H, D)
        places = first + torch.arange(x.shape[1])
        angles = places[:, None] * 10000.0 ** (-torch.arange(0, self.D, 2) / self.D)    # (T, D/2)
        cos, sin = angles.cos()[None, :, None], angles.sin()[None, :, None]         # (1, T, 1, D/2)
        q, k = rotate(q, cos, sin, True), rotate(k, cos, sin, True) * self.D ** -0.5
        return *(each.transpose(1, 2) for each in (q, k, v)), gate

    def output(self, y, gate):
        """The heads' sums y (B, H, T, D), normed, gated and projected."""
        y = F.rms_norm(y, (self.D,), None, 1e-6).transpose(1, 2).flatten(-2)        # (B, T, W)
        return self.out(F.silu(gate) * y)

    def forward(self, x):
        q, k, v, gate = self.heads(x)
        places = torch.arange(x.shape[1])
        distance = places[:, None] - places                                         # (T, T)
        fade = self.gamma[:, None, None] ** distance.clamp(min=0) * (distance >= 0)     # (H, T, T)
        return self.output((q @ k.transpose(-1, -2) * fade) @ v, gate)

    def step(self, x, state, place):
        """One token x (B, W) at a place and the state (B, H, D, D) before it -> (y (B, W), the state
        after)."""
        q, k, v, gate = self.heads(x[:, None], place)
        state = self.gamma[:, None, None] * state + k.transpose(-1, -2) @ v
        return self.output(q @ state, gate)[:, 0], state

    def first_state(self, x):
        return torch.zeros(len(x), self.H, self.D, self.D)
