"""The readouts once more, in their cheap form: from the last hidden layer to the token and back, no field in between.

Exact rearrangements of `apm.student.model` behind the feature head ``f = W h + b`` of the coordinate MLP:

* one query needs no keys: ``score_l = (W_k' q) . (f_l + p_l)``, one vector per head, not a projection per location;
* nor values: ``sum a_l W_v (f_l + p_l) = W_v sum a_l (f_l + p_l)``;
* the head is linear, so it moves behind the sum as well: ``sum a_l f_l = W sum a_l h_l + b``;
* what is added to all scores alike (the key's bias, the head's) leaves the softmax as it is and has no gradient.

The backward passes are written out by hand. B samples, each with its own weights; Q locations; H = width of the last
hidden layer; D = width of the token.
"""

from typing import Protocol

import torch
from torch import Tensor

from apm.student.config import APMConfig
from apm.student.matmul import product

Parameters = dict[str, Tensor]  # name -> (B, *shape)


class Pooling(Protocol):
    """Forward and hand-written backward of one readout together with the feature head before it."""

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Last hidden layer (B, Q, H) at locations with codes (Q, D) -> tokens (B, D)."""

    def backward(self, d_token: Tensor, out: Tensor) -> None:
        """Gradient of the tokens (B, D) -> of the hidden layer into ``out`` (B, Q, H), of the weights into theirs."""


class MeanPooling:
    """`apm.student.model.MeanReadout` behind the feature head: the mean of the hidden layer goes through the head."""

    def __init__(self, weights: Parameters, gradients: Parameters) -> None:
        """Use these weights; write gradients into these."""
        self.weights, self.gradients = weights, gradients

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """See `Pooling`; the positions do not matter."""
        self.mean = hidden.mean(dim=1)[:, None]  # (B, 1, H)
        token = product(self.mean, self.weights["mlp.head.weight"].mT)[:, 0]
        return token + self.weights["mlp.head.bias"]

    def backward(self, d_token: Tensor, out: Tensor) -> None:
        """See `Pooling`."""
        torch.mul(d_token[:, :, None], self.mean, out=self.gradients["mlp.head.weight"])
        self.gradients["mlp.head.bias"].copy_(d_token)
        d_mean = product(d_token[:, None], self.weights["mlp.head.weight"])  # (B, 1, H)
        out.copy_(d_mean / out.shape[1])


class QueryPooling:
    """`apm.student.model.ObjectQuery` behind the feature head."""

    def __init__(self, config: APMConfig, weights: Parameters, gradients: Parameters) -> None:
        """Use these weights; write gradients into these."""
        self.heads, self.head_dim = config.heads, config.dim // config.heads
        self.scale = self.head_dim**-0.5
        self.head = weights["mlp.head.weight"]  # (B, D, H)
        self.head_bias = weights["mlp.head.bias"]
        self.d_head = gradients["mlp.head.weight"]
        self.d_head_bias = gradients["mlp.head.bias"]
        self.query = weights["readout.query"]
        self.d_query = gradients["readout.query"]
        # the rows of the one packed projection: query, key, value; key and value are used head by head
        prefix = "readout.attention."
        self.query_proj, key, value = weights[prefix + "in_proj_weight"].chunk(3, dim=1)
        self.query_bias, _, self.value_bias = weights[prefix + "in_proj_bias"].chunk(3, dim=1)
        self.d_query_proj, d_key, d_value = gradients[prefix + "in_proj_weight"].chunk(3, dim=1)
        self.d_query_bias, self.d_key_bias, self.d_value_bias = gradients[prefix + "in_proj_bias"].chunk(3, dim=1)
        by_head = (len(self.head), self.heads, self.head_dim, config.dim)
        self.key_proj, self.value_proj = key.view(by_head), value.view(by_head)
        self.d_key_proj, self.d_value_proj = d_key.view(by_head), d_value.view(by_head)
        self.out_proj, self.out_bias = weights[prefix + "out_proj.weight"], weights[prefix + "out_proj.bias"]
        self.d_out_proj, self.d_out_bias = gradients[prefix + "out_proj.weight"], gradients[prefix + "out_proj.bias"]

    def forward(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """See `Pooling`."""
        batch = len(hidden)
        self.hidden, self.positions = hidden, positions.expand(batch, -1, -1)
        query = product(self.query_proj, self.query[:, :, None])[..., 0] + self.query_bias  # (B, D)
        self.scaled_query = query.view(batch, self.heads, 1, self.head_dim) * self.scale
        self.key = product(self.scaled_query, self.key_proj)[:, :, 0]  # W_k' q: (B, heads, D)
        self.probe = product(self.key, self.head)  # the same, seen from the hidden layer: (B, heads, H)
        scores = product(self.probe, hidden.mT) + product(self.key, self.positions.mT)
        self.attention = scores.softmax(dim=-1)  # (B, heads, Q)
        self.pooled = product(self.attention, hidden)  # (B, heads, H)
        self.content = product(self.pooled, self.head.mT) + product(self.attention, self.positions)
        self.content += self.head_bias[:, None]  # sum a (f + p): (B, heads, D)
        value = product(self.value_proj, self.content[..., None])  # (B, heads, D / heads, 1)
        self.value = value.view(batch, -1) + self.value_bias  # heads joined: (B, D)
        return product(self.out_proj, self.value[:, :, None])[..., 0] + self.out_bias

    def backward(self, d_token: Tensor, out: Tensor) -> None:
        """See `Pooling`."""
        batch = len(out)
        torch.mul(d_token[:, :, None], self.value[:, None], out=self.d_out_proj)
        self.d_out_bias.copy_(d_token)
        d_value = product(self.out_proj.mT, d_token[:, :, None])  # (B, D, 1)
        self.d_value_bias.copy_(d_value[..., 0])
        d_value = d_value.view(batch, self.heads, self.head_dim, 1)
        torch.mul(d_value, self.content[:, :, None], out=self.d_value_proj)
        d_content = product(self.value_proj.mT, d_value)[..., 0]  # (B, heads, D)
        torch.sum(d_content, dim=1, out=self.d_head_bias)

        d_pooled = product(d_content, self.head)  # (B, heads, H)
        d_attention = product(d_pooled, self.hidden.mT) + product(d_content, self.positions.mT)
        d_scores = d_attention - (self.attention * d_attention).sum(dim=-1, keepdim=True)
        d_scores *= self.attention  # (B, heads, Q)
        # the hidden layer is used twice, pooled by the attention and probed by the scores: one product for both
        product(torch.cat((self.attention, d_scores), 1).mT, torch.cat((d_pooled, self.probe), 1), out=out)

        d_probe = product(d_scores, self.hidden)  # (B, heads, H)
        product(torch.cat((d_content, self.key), 1).mT, torch.cat((self.pooled, d_probe), 1), out=self.d_head)
        d_key = product(d_scores, self.positions) + product(d_probe, self.head.mT)  # (B, heads, D)
        torch.mul(self.scaled_query.mT, d_key[:, :, None], out=self.d_key_proj)
        self.d_key_bias.zero_()
        d_query = product(self.key_proj, d_key[..., None]).view(batch, -1) * self.scale  # (B, D)
        torch.mul(d_query[:, :, None], self.query[:, None], out=self.d_query_proj)
        self.d_query_bias.copy_(d_query)
        self.d_query.copy_(product(self.query_proj.mT, d_query[:, :, None])[..., 0])
