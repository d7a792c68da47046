"""State of the quantized layers of a loaded model."""

from lmms_plugin.quant_backends.layers.linear import QuantizedLinear


def states(loaded):
    """Every tensor of every quantized layer, by its name in the model."""
    layers = {n: m for n, m in loaded.model.named_modules() if isinstance(m, QuantizedLinear)}
    return {f"{name}.{key}": value for name, layer in layers.items() for key, value in layer.state_dict().items()}
