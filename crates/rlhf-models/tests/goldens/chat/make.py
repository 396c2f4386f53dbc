"""Writes templates.json: chat templates with what transformers makes of conversations.

    pip install transformers==5.23.0 jinja2 && python make.py

The templates are written for this test. Each behaves as the family it is named after, and uses what
the templates of that family use of Jinja.
"""
import json
import os
import sys

import jinja2
import transformers
from transformers import PreTrainedTokenizerFast

here = os.path.dirname(os.path.abspath(__file__))

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}"""

ZEPHYR = """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {{ raise_exception('there is no system role') }}
{%- endif -%}
{%- for message in messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate: user, assistant, user, ...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' ~ role ~ '\\n' ~ (message['content'] | trim) ~ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(turn=0) %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message.role == "user" and ns.turn % 2 == 0 %}
        {%- set ns.turn = ns.turn + 1 %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.role == "assistant" and ns.turn % 2 == 1 %}
        {%- set ns.turn = ns.turn + 1 %}
        {%- if message.tool_calls is defined and message.tool_calls is not none %}
            {{- "[TOOL_CALLS] [" }}
            {%- for call in message.tool_calls %}
                {%- set out = call.function | tojson %}
                {{- out[:-1] + ', "id": "' + call.id + '"}' }}
                {%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}
            {{- "]" + eos_token }}
        {%- else %}
            {%- generation -%}
            {{- " " + message["content"] + eos_token }}
            {%- endgeneration -%}
        {%- endif %}
    {%- else %}
        {{- raise_exception("roles must alternate") }}
    {%- endif %}
{%- endfor %}"""

LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}{{- "Environment: ipython\\n" }}{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("one call at a time") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {{- messages[0]['content'] if messages[0]['role'] == 'system' else 'You are helpful.' }}
    {{- "\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}{{- '\\n' + message.content }}{%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}
    {%- if message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or (not loop.last and reasoning_content)) %}
            {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

# What Python writes of values, and what Jinja does with filters, tests and macros.
VALUES = """{%- macro show(name, value='-') -%}[{{ name }}={{ value }}]{%- endmacro -%}
{{ true }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ 0.00001 }} {{ 3 / 2 }} {{ 7 // 2 }} {{ missing }}|
{{ messages[0].extra }} {{ messages[0].extra | string | length }}
{{ messages[0].extra | tojson }}
{{ messages[0].extra | tojson(indent=2) }}
{{ messages[0].extra | tojson(sort_keys=true, separators=(',', ':')) }}
{{ messages[0].extra | tojson(ensure_ascii=true) }}
{% for key, value in messages[0].extra.items() %}
  {{ show(key) }} {{ show(key, value) -}}
{% endfor %}
{% for message in messages if message.role != 'system' %}
    {% if message.content == 'stop' %}{% break %}{% endif %}
{{ loop.index }}/{{ loop.length }} {{ message.content | upper | replace('A', 'b') }} {{ message.content.split() | join(',') }}
{% endfor %}
{% for m in messages | selectattr('role', 'equalto', 'user') | list %}{{ m.content.title() }};{% endfor %}
{{ messages | map(attribute='role') | unique | join(' ') }} {{ 'x' in 'xyz' }} {{ [1, 2] + [3] }} {{ {'a': 'it\\'s'} }}
{{ documents | length if documents else 'no documents' }} {{ add_generation_prompt }} {{ "%s" | format(bos_token) }}
"""

question = {"role": "user", "content": "  What is the weather in Paris?  "}
answer = {"role": "assistant", "content": "Sunny & 20 °C, \"warm\". "}
system = {"role": "system", "content": "Be brief. "}
follow = {"role": "user", "content": "And in Rome?"}
tool = {"type": "function", "function": {"name": "weather", "description": "The weather's <state>", "parameters": {"type": "object", "properties": {"place": {"type": "string", "enum": ["Paris", "Zürich"]}}, "required": ["place"]}}}
call = {"role": "assistant", "content": "", "tool_calls": [{"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich", "days": 2, "exact": True, "scale": 0.5}}}]}
result = {"role": "tool", "name": "weather", "content": "{\"sky\": \"clear\"}"}
thought = {"role": "assistant", "content": "<think>\nhmm\n</think>\n\nYes."}
reasoned = {"role": "assistant", "content": "Yes.", "reasoning": "so it is"}
date = {"date_string": "26 Jul 2024"}

plain = [[question], [question, answer], [system, question, answer, follow]]
noargs = [(m, {}) for m in plain]
CASES = {
    "chatml": (CHATML, noargs),
    "zephyr": (ZEPHYR, noargs),
    "gemma2": (GEMMA, noargs + [([question, follow], {}), ([question, answer, follow], {})]),
    "mistral": (MISTRAL, noargs + [([question, call], {}), ([question, question], {})]),
    "llama3": (LLAMA, [(m, date) for m in plain] + [([question, call, result], {**date, "tools": [tool]}), ([question, call, {**result, "content": {"sky": "clear"}}], {**date, "tools": [tool]})]),
    "qwen25": (QWEN25, noargs + [([system, question, call, result, result, answer], {"tools": [tool]})]),
    "qwen3": (QWEN3, noargs + [([question, thought], {}), ([question, thought, follow], {"enable_thinking": False}), ([question, reasoned], {})]),
    "values": (VALUES, [([{**question, "extra": {"z": [1, 2.5, None, True], "a": {"é\n": "it's \"q\" <&>"}, "e": [], "f": {}, "big": 1e22, "n": -0.0}}, answer, follow, {"role": "user", "content": "stop"}, answer], {"documents": [{"title": "t", "text": "x"}]}),
                        ([{**question, "extra": {}}, system, answer], {})]),
}

tokenizer = PreTrainedTokenizerFast(tokenizer_file=os.path.join(here, "../tokenizers/chatml/tokenizer.json"),
                                    bos_token="<|endoftext|>", eos_token="<|im_end|>")
out = {"peer": {"transformers": transformers.__version__, "jinja2": jinja2.__version__}, "templates": {}, "cases": [], "post_processor": []}
for name, (template, conversations) in CASES.items():
    out["templates"][name] = template
    for messages, arguments in conversations:
        for end in ["closed", "generation_prompt", "open_final_message"]:
            case = {"template": name, "messages": messages, "arguments": arguments, "end": end}
            try:
                case["text"] = tokenizer.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=end == "generation_prompt",
                    continue_final_message=end == "open_final_message", **arguments)
            except Exception as error:
                case["error"] = str(error).split("\n")[0][:80]
            out["cases"].append(case)

text = "Hello world"
for bos in [None, False, True]:
    for eos in [None, False, True]:
        flags = {k: v for k, v in [("add_bos_token", bos), ("add_eos_token", eos)] if v is not None}
        for folder in ["chatml", "llama3_style"]:
            t = PreTrainedTokenizerFast.from_pretrained(os.path.join(here, "../tokenizers", folder), **flags)
            out["post_processor"].append({"folder": folder, "flags": flags, "ids": t(text)["input_ids"]})
with open(os.path.join(here, "templates.json"), "w") as f:  # a case a line
    lines = lambda items: ",\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    f.write('{"peer": %s,\n"templates": %s,\n"cases": [\n%s\n],\n"post_processor": [\n%s\n]}\n' % (
        json.dumps(out["peer"]), json.dumps(out["templates"], indent=1, ensure_ascii=False), lines(out["cases"]), lines(out["post_processor"])))
print(len(out["cases"]), "cases", sum("error" in c for c in out["cases"]), "errors", file=sys.stderr)
