"""How many floating-point operations a forward pass takes, by formula."""

from torch import nn
from transformers import PreTrainedModel

# Families whose attention is the two products of equation 7's scores and the values, and nothing beside them.
_PLAIN = ("bert", "roberta", "xlm-roberta", "electra", "distilbert", "albert", "mpnet")


def forward_flops(model: PreTrainedModel, batch: int, length: int) -> int | None:
    """Return the operations of one forward pass: 2 for each weight a token meets, 4 T d for its attention.

    With B texts of T pieces, L layers of width d and F feed-forward neurons: 2 B T L (4 d^2 + 2 d F) for the
    matrix products of the layers, 4 B T^2 d L for queries times keys and probabilities times values, and 2
    for each weight of the head: times B where it reads the first piece alone, times B T where it reads all.
    Sums over elements (norms, activations, softmax, biases) are left out, as is the custom.

    Args:
        model: With any head, or none.
        batch: B.
        length: T.

    Returns:
        None for families whose attention is more than these products, such as DeBERTa.
    """
    config = model.config
    if config.model_type not in _PLAIN:
        return None
    is_sequence_head = type(model).__name__.endswith("ForSequenceClassification")
    total = 4 * batch * length**2 * config.hidden_size * config.num_hidden_layers
    for name, part in model.named_modules():
        if not isinstance(part, nn.Linear):
            continue
        in_stack, runs = ".layer." in f".{name}", 1
        if "albert_layer_groups" in name:  # one layer's weights, run many times
            in_stack, runs = True, config.num_hidden_layers // config.num_hidden_groups
        reads_first = not in_stack and "embedding" not in name and (is_sequence_head or "pooler" in name)
        total += 2 * part.weight.numel() * runs * batch * (1 if reads_first else length)
    return total
