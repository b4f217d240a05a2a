#!/usr/bin/env python3
"""The package in use: load the default model, generate, stream, look at the figures."""

from eagle.model.ea_model import EaModel

model = EaModel.from_pretrained("SmolLM2-135M")
tokenizer = model.get_tokenizer()
message = {"role": "user", "content": "Explain gravity in two sentences."}
prompt = tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
input_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids

output = model.generate(input_ids, max_new_tokens=64)
print(tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True))
stats = model.last_stats
print(f"accept length {stats.accept_length:.2f}, {stats.tokens_per_second:.1f} tokens/s")

# The reference's streaming method yields the whole output so far after every step.
shown = ""
for so_far in model.ea_generate(input_ids, max_new_tokens=64):
    text = tokenizer.decode(so_far[0, input_ids.shape[1] :], skip_special_tokens=True)
    if not text.endswith("\ufffd"):  # half a character: wait for its other half
        print(text[len(shown) :], end="", flush=True)
        shown = text
print()
