"""Sentence encoder: a BERT stack, mean pooling and L2 normalisation, in plain torch.

Holds the shape of all-MiniLM-L6-v2, without its weights (`examples/build.py` brings them). It is
also the `model.py` of the eager example, so it imports nothing but torch and defines exactly one
nn.Module, which is constructed without arguments.
"""

from torch import Tensor, nn


class Encoder(nn.Module):
    """input_ids, attention_mask: INT64 [batch, sequence] -> FP32 [batch, width], of length 1."""

    def __init__(
        self,
        vocabulary: int = 30522,
        width: int = 384,
        layers: int = 6,
        heads: int = 12,
        inner: int = 1536,
        positions: int = 512,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.word = nn.Embedding(vocabulary, width)
        self.position = nn.Embedding(positions, width)
        self.segment = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query": nn.Linear(width, width),
                    "key": nn.Linear(width, width),
                    "value": nn.Linear(width, width),
                    "mix": nn.Linear(width, width),
                    "mix_norm": nn.LayerNorm(width, eps=1e-12),
                    "expand": nn.Linear(width, inner),
                    "shrink": nn.Linear(inner, width),
                    "shrink_norm": nn.LayerNorm(width, eps=1e-12),
                }
            )
            for _ in range(layers)
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        batch, sequence = input_ids.size(0), input_ids.size(1)
        # One segment, and positions from 0: slices of the tables, so that no device is written
        # into the exported graph.
        x = self.word(input_ids) + self.position.weight[:sequence] + self.segment.weight[0]
        x = self.norm(x)
        mask = attention_mask.to(x.dtype)
        # A large finite number and not -inf: a row without any token must not become NaN.
        bias = ((1.0 - mask) * -1e9)[:, None, None, :]
        for layer in self.layers:
            split = (batch, sequence, self.heads, x.size(2) // self.heads)
            query = layer["query"](x).view(split).transpose(1, 2)  # type: ignore[index]
            key = layer["key"](x).view(split).transpose(1, 2)  # type: ignore[index]
            value = layer["value"](x).view(split).transpose(1, 2)  # type: ignore[index]
            mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
            mixed = mixed.transpose(1, 2).reshape(batch, sequence, x.size(2))
            x = layer["mix_norm"](x + layer["mix"](mixed))  # type: ignore[index]
            inner = nn.functional.gelu(layer["expand"](x))  # type: ignore[index]
            x = layer["shrink_norm"](x + layer["shrink"](inner))  # type: ignore[index]
        weight = mask[:, :, None]
        mean = (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(mean, p=2.0, dim=1)
