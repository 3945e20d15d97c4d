"""vLLM in a process of its own: read a request as JSON from stdin, print the answer as a line of stdout.

A request has `model`, `arguments` (of vllm.LLM), `prompts` (token ids), `max_tokens` and `prompt_logprobs`. The answer
has the generated `tokens`, the `logprobs` of each prompt's tokens, and the `bytes` of the linears that are packed.
"""

import json
import os
import sys
from typing import Any

os.environ.update({"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def packed_bytes(model: Any) -> int:
    """Return the bytes of S, U and V of all packed linears."""
    layers = [module.packed for module in model.modules() if hasattr(module, "packed")]
    return sum(tensor.nbytes for layer in layers for tensor in layer.parameters())


def main() -> None:
    from vllm import LLM, SamplingParams

    request = json.load(sys.stdin)
    arguments = {"max_model_len": 256, "enforce_eager": True, "dtype": "float32"} | request["arguments"]
    llm = LLM(model=request["model"], **arguments)
    prompts: Any = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    wanted = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        ignore_eos=True,
        detokenize=False,
        prompt_logprobs=0 if request.get("prompt_logprobs") else None,
    )
    outputs = llm.generate(prompts, wanted, use_tqdm=False)
    logprobs = [
        [
            entry[token].logprob
            for entry, token in zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        ]
        for output in outputs
        if output.prompt_logprobs
    ]
    answer = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": logprobs,
        "bytes": llm.apply_model(packed_bytes) if arguments.get("tensor_parallel_size", 1) == 1 else [],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
