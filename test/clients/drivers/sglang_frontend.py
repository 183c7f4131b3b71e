"""Owns what SGLang's front-end language is asked to do, through its RuntimeEndpoint."""

import sglang as sgl
from steps import FLOW, URL, run, step

sgl.set_default_backend(sgl.RuntimeEndpoint(URL))
CHOICES = [" big", " clonal colony", " seven"]


@sgl.function
def ask(s, question):
    s += sgl.system(FLOW["system"])
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=FLOW["max_tokens"], temperature=0))
    s += sgl.user(FLOW["follow_up"])
    s += sgl.assistant(sgl.gen("more", max_tokens=FLOW["max_tokens"], temperature=0))


@sgl.function
def complete(s, prompt, **options):
    s += prompt + sgl.gen("text", **{"max_tokens": FLOW["max_tokens"], "temperature": 0, **options})


@sgl.function
def choose(s, method):
    s += "A ramet is one plant of a" + sgl.select("choice", choices=CHOICES, choices_method=method)
    s += sgl.gen("text", max_tokens=4, temperature=0)


@step
def gen():
    return {"text": complete.run(prompt=FLOW["prompt"])["text"]}


@step
def gen_roles():
    state = ask.run(question=FLOW["question"])
    return {"texts": [state["answer"], state["more"]]}


@step
def gen_stream():
    state = complete.run(prompt=FLOW["prompt"], stream=True)
    pieces = list(state.text_iter("text"))
    return {"text": "".join(pieces), "num_pieces": len(pieces)}


@step
async def gen_stream_async():
    state = complete.run(prompt=FLOW["prompt"], stream=True)
    return {"text": "".join([piece async for piece in state.text_async_iter("text")])}


@step
def gen_batch():
    states = complete.run_batch([{"prompt": FLOW["prompt"]}] * 3, num_threads=3)
    return {"texts": [state["text"] for state in states]}


@step
def gen_options():
    """Every option that the language has for a generation."""
    state = complete.run(
        prompt=FLOW["prompt"],
        min_tokens=2,
        n=1,
        stop=["\n"],
        stop_token_ids=[0],
        top_p=1.0,
        top_k=-1,
        min_p=0.0,
        frequency_penalty=0.0,
        presence_penalty=0.0,
        ignore_eos=False,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        return_text_in_logprobs=True,
    )
    meta = state.get_meta_info("text")
    return {
        "text": state["text"],
        "input": [entry[2] for entry in meta["input_token_logprobs"]],
        "output": [entry[2] for entry in meta["output_token_logprobs"]],
        "num_tops": [len(tops) for tops in meta["output_top_logprobs"]],
    }


@step
def gen_stop():
    return {"text": complete.run(prompt=FLOW["prompt"], stop=" of")["text"]}


@step
def gen_regex():
    return {"text": complete.run(prompt=FLOW["prompt"], regex="(oak|fern|moss) [0-9]{2}")["text"]}


@step
def gen_json():
    import json

    schema = json.dumps(FLOW["schema"])
    return {
        "text": complete.run(prompt=FLOW["prompt"], json_schema=schema, max_tokens=FLOW["max_object_tokens"])["text"]
    }


@step
def gen_types():
    @sgl.function
    def count(s):
        s += "There are " + sgl.gen("number", dtype=int, max_tokens=4, temperature=0)
        s += " plants, is it so? " + sgl.gen("truth", dtype=bool, max_tokens=8, temperature=0)

    state = count.run()
    return {"number": state["number"], "truth": state["truth"]}


@step
def gen_choices():
    """A generation among choices is a selection."""
    return {"text": complete.run(prompt="A ramet is one plant of a", choices=CHOICES)["text"]}


@step
def select_token_length_normalized():
    return {"choice": choose.run(method=sgl.token_length_normalized)["choice"]}


@step
def select_greedy_token():
    return {"choice": choose.run(method=sgl.greedy_token_selection)["choice"]}


@step
def select_unconditional():
    return {"choice": choose.run(method=sgl.unconditional_likelihood_normalized)["choice"]}


@step
def fork():
    @sgl.function
    def branch(s):
        s += FLOW["prompt"]
        forks = s.fork(3)
        forks += sgl.gen("text", max_tokens=FLOW["max_tokens"], temperature=0)
        forks.join()
        s["texts"] = [one["text"] for one in forks]

    return {"texts": branch.run()["texts"]}


@step
def prefix_cached():
    """A batch whose prompts share a prefix has it cached first, by a request for no tokens."""

    @sgl.function
    def shared(s, last):
        s += "A ramet is one plant of a clonal colony. A genet is" + last
        s += sgl.gen("text", max_tokens=8, temperature=0)

    states = shared.run_batch([{"last": last} for last in (" a", " the", " one")], num_threads=2)
    return {"texts": [state["text"] for state in states]}


@step
def server_info():
    sgl.flush_cache()
    return sorted(sgl.get_server_info())


run()
