"""vLLM's own offline `chat`, driven by `bench.served` over pipes; runs in vLLM's environment, without this package.

    python offline_vllm.py CHECKPOINT DTYPE LENGTH TOKENS

For each line on standard input, the path of a JSON list of conversations, it answers all of them and prints how many
tokens it wrote.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    """Load, and answer line by line."""
    from vllm import LLM, SamplingParams

    checkpoint, dtype, length, tokens = sys.argv[1:]
    model = LLM(
        checkpoint,
        dtype=dtype,
        max_model_len=int(length),
        enforce_eager=True,
        max_num_seqs=8,
        block_size=32,
        generation_config="vllm",
    )
    settings = SamplingParams(temperature=0.0, max_tokens=int(tokens))
    print("READY", flush=True)
    for line in sys.stdin:
        conversations = json.loads(Path(line.strip()).read_text())
        answers = model.chat(conversations, settings, use_tqdm=False, chat_template_content_format="openai")
        written = sum(len(answer.outputs[0].token_ids) for answer in answers)
        print(json.dumps(["DONE", written]), flush=True)


if __name__ == "__main__":
    main()
