"""Owns the question whether a chat template goes through the parts of a message's content, or takes it as a text."""

from jinja2 import nodes

PART_FILTERS = frozenset({"selectattr", "rejectattr", "map"})
PART_NAMES = frozenset({"type", "text"})


def iterates_over_content(template: nodes.Template) -> bool:
    """Whether a loop, a filter or an index of the parsed template takes a message's content as a list of parts."""
    names = _content_names(template)
    loops = any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For))
    filters = any(one.name in PART_FILTERS and one.node is not None and _is_content(one.node, names)
                  for one in template.find_all(nodes.Filter))  # fmt: skip
    return loops or filters or any(_is_part(node, names) for node in template.find_all((nodes.Getitem, nodes.Getattr)))


def _content_names(template: nodes.Template) -> frozenset[str]:
    """Variables and parameters of macros that hold a message's content somewhere."""
    names: set[str] = set()
    while True:
        found = set(names)
        for assign in template.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                found.add(assign.target.name)
        for macro in template.find_all(nodes.Macro):
            for call in template.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and call.node.name == macro.name:
                    found |= {parameter.name for parameter, value in zip(macro.args, call.args, strict=False)
                              if _is_content(value, names)}  # fmt: skip
        if found == names:
            return frozenset(names)
        names = found


def _is_content(node: nodes.Node, names: set[str] | frozenset[str]) -> bool:
    """Whether the expression is a message's content, or nothing but chosen or filtered from it."""
    if isinstance(node, nodes.Name):
        return node.name in names
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        if isinstance(node.arg, nodes.Slice):
            return _is_content(node.node, names)
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.Call):  # message.get("content")
        is_get = isinstance(node.node, nodes.Getattr) and node.node.attr == "get"
        return is_get and bool(node.args) and isinstance(node.args[0], nodes.Const) and node.args[0].value == "content"
    if isinstance(node, nodes.Filter):
        return (
            node.node is not None
            and node.name in (*PART_FILTERS, "list", "default", "d")
            and _is_content(node.node, names)
        )
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, names) or (node.expr2 is not None and _is_content(node.expr2, names))
    return isinstance(node, nodes.Or) and (_is_content(node.left, names) or _is_content(node.right, names))


def _is_part(node: nodes.Node, names: frozenset[str]) -> bool:
    """Whether the expression is content[0].text, or such."""
    if isinstance(node, nodes.Getattr):
        name, whole = node.attr, node.node
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        name, whole = node.arg.value, node.node
    else:
        return False
    if name not in PART_NAMES or not isinstance(whole, nodes.Getitem):
        return False
    is_index = isinstance(whole.arg, nodes.Const) and isinstance(whole.arg.value, int)
    return is_index and _is_content(whole.node, names)
