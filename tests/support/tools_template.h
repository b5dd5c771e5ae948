/* A chat template with tools: ChatML; "T:" and a tool a line, then "E". */
#ifndef MEPIC_TESTS_SUPPORT_TOOLS_TEMPLATE_H
#define MEPIC_TESTS_SUPPORT_TOOLS_TEMPLATE_H

static const char tools_template[] =
    "{{ '<|im_start|>' + role }}{{ \"\\n\\nT:\\n<tools>\" }}{{ tool | tojson }}"
    "{{ \"\\n</tools>\\nE <tool_call>\\\"name\\\" \\\"arguments\\\"</tool_call><|im_end|>\\n\" }}<tool_response>";

#endif
