"""A plain, slow cache that stores what a model computed and rounds all of it anew, token by token, at every step.

It follows the definition in docs/kv_cache.md by loops over tokens, heads and channels, and shares no code with the
package's own.
"""

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def grid(values, bits):
    """Round some numbers that share a scale."""
    stored = torch.bfloat16 if values.dtype == torch.bfloat16 else torch.float16
    values = values.float()
    zero = values.min().to(stored).float()
    step = ((values.max() - values.min()) / (2**bits - 1)).to(stored).float()
    if step == 0:
        return zero.expand_as(values)
    return zero + step * ((values - zero) / step).round().clamp(0, 2**bits - 1)


def scaled_float(values, kind):
    largest = torch.finfo(kind).max
    scale = (values.float().abs().max() / largest).to(torch.float16).float()
    if scale == 0:
        return torch.zeros_like(values)
    return (values.float() / scale).clamp(-largest, largest).to(kind).float() * scale


def one_group(values, bits, format, scaled):
    if format == "int":
        return grid(values, bits)
    if scaled:
        return scaled_float(values, FLOATS[format])
    largest = torch.finfo(FLOATS[format]).max
    return values.float().clamp(-largest, largest).to(FLOATS[format]).float()


class SlowLayer(DynamicLayer):
    """Layer of a batch of one row without padding.

    Args:
        is_image: for each token of the prompt, whether it is one of an image.
        told: `bits`, `image_bits`, `format`, `group` (None without scales), `channel`, `part`, `first`, `last`, and
            `rotation`, an orthogonal matrix (width, width) in whose basis heads are rounded, or None.
        window: of the layer; None for all tokens.
    """

    def __init__(self, is_image, window=None, **told):
        super().__init__()
        self.is_image, self.told, self.window = is_image, told, window

    def update(self, key_states, value_states, *args, **kwargs):
        read = self.get_seq_length()
        keys, values = super().update(key_states, value_states)
        prompt = len(self.is_image)
        if read < prompt - 1:
            return keys, values
        shown = [self.as_read(keys.clone(), "keys"), self.as_read(values.clone(), "values")]
        if self.window is not None:
            shown = [states[:, :, -self.window :] for states in shown]
        return tuple(shown)

    def get_mask_sizes(self, query_length):
        length = self.get_seq_length() + query_length
        if self.window is None or query_length > 1:
            return length, 0
        shown = min(length, self.window)
        return shown, length - shown

    def as_read(self, states, name):
        told, now = self.told, states.shape[2]
        if told["part"] not in ("both", name):
            return states
        if (matrix := told["rotation"]) is not None:
            turned = (states.double() @ matrix).to(states.dtype)
            self.told = {**told, "rotation": None}
            turned, self.told = self.as_read(turned, name), told
            return (turned.double() @ matrix.T).to(states.dtype)
        original = states.clone()
        images = [*self.is_image, *[False] * (now - len(self.is_image))]
        bits = [told["image_bits" if image else "bits"] for image in images]
        if name == "keys" and told["channel"] and told["group"]:
            for tokens in self.groups(images, now):
                if bits[tokens[0]] < 16:
                    self.channels(states, original, tokens, bits[tokens[0]])
            return states
        for token in range(told["first"], now - told["last"]):
            if bits[token] < 16:
                self.token(states, original, token, bits[token])
        return states

    def groups(self, images, now):
        """Complete groups of consecutive tokens of one kind, none of them to be kept."""
        size, first, last = self.told["group"], self.told["first"], self.told["last"]
        found, run = [], []
        for token in range(first, now):
            if run and (images[run[-1]] != images[token] or len(run) == size):
                found.append(run)
                run = []
            run.append(token)
        # The last run goes on if it is text, which all new tokens are.
        if run and (len(run) == size or images[run[-1]] != self.kind_after(run[-1])):
            found.append(run)
        return [tokens for tokens in found if tokens[-1] < now - last]

    def kind_after(self, token):
        return self.is_image[token + 1] if token + 1 < len(self.is_image) else False

    def channels(self, states, original, tokens, bits):
        held = tokens
        if self.window is not None:
            # A window that the answer has moved on has lost the oldest tokens when a group is complete.
            at = max(tokens[-1] + 1 + self.told["last"], len(self.is_image) - 1)
            kept = self.window if at > len(self.is_image) - 1 else self.window - 1
            held = [token for token in tokens if token >= at - kept]
        if not held:
            return
        for head in range(states.shape[1]):
            for channel in range(states.shape[3]):
                values = original[0, head, held, channel]
                states[0, head, held, channel] = one_group(values, bits, self.told["format"], True).to(states.dtype)

    def token(self, states, original, token, bits):
        size = self.told["group"] or states.shape[3]
        for head in range(states.shape[1]):
            for start in range(0, states.shape[3], size):
                part = slice(start, start + size)
                values = original[0, head, token, part]
                found = one_group(values, bits, self.told["format"], bool(self.told["group"]))
                states[0, head, token, part] = found.to(states.dtype)


def slow_logits(model, inputs, image_token, tokens, **told):
    """Logits of each token of an answer, by a loop over `model.forward` with slow caches.

    Args:
        model: loaded model.
        inputs: keyword arguments for one prompt without padding.
        image_token: id of the image placeholder.
        tokens: ids of the answer.
        told: as `SlowLayer`.
    """
    text = model.config.get_text_config(decoder=True)
    is_image = (inputs["input_ids"][0] == image_token).tolist()
    cache = DynamicCache(config=text)
    cache.layers = [SlowLayer(is_image, getattr(layer, "sliding_window", None), **told) for layer in cache.layers]
    length = len(is_image)
    per_token = {name: value for name, value in inputs.items() if value.shape == inputs["input_ids"].shape}
    rest = {name: value for name, value in inputs.items() if name not in per_token}
    with torch.no_grad():
        model(**{name: value[:, :-1] for name, value in per_token.items()}, **rest, cache=cache, use_cache=True)
        logits, ids = [], [int(inputs["input_ids"][0, -1]), *tokens[:-1]]
        for step, token in enumerate(ids):
            deltas = (
                m.rope_deltas for m in model.modules() if isinstance(getattr(m, "rope_deltas", None), torch.Tensor)
            )
            mask = torch.ones(1, length + step, dtype=torch.long)
            place = torch.tensor([[length - 1 + step]])
            if (delta := next(deltas, None)) is not None:
                place = (place + delta).expand(3, 1, 1)
            named = {"attention_mask": mask, "position_ids": place, "cache": cache, "use_cache": True}
            output = model(input_ids=torch.tensor([[token]]), **named)
            logits.append(output.logits[0, -1])
    return torch.stack(logits)
