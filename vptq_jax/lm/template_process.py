"""The process in which `chat.render` runs a template of unknown origin; it knows nothing but jinja2.

Standard input: a JSON object with `template` and `variables`. Standard output: a JSON object with `text`, or with
`said` (the template raised its own message) or `fault` (it does not work, or takes more than it may).
"""

import json
import resource
import sys
from datetime import datetime

import jinja2.ext
import jinja2.utils
from jinja2 import TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MEMORY = 1 << 30  # bytes of address space beside what the interpreter has
SECONDS = 5  # of the processor
LONGEST = 1 << 24  # characters of the text


class Said(TemplateError):
    """What a template says on purpose."""


class Generation(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}`, which marks the model's own words: the body as it is."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own way

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        """See `jinja2.ext.Extension`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Names(jinja2.utils.Namespace):
    """`namespace(...)`: variables that a template may assign in a loop; none that begins with an underscore."""

    def __init__(*values, **named):  # a name may be `self`
        for name in dict(*values[1:], **named):
            Names.check(name)
        jinja2.utils.Namespace.__init__(*values, **named)

    def __setitem__(self, name: str, value: object) -> None:
        Names.check(name)
        super().__setitem__(name, value)

    @staticmethod
    def check(name: object) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"a namespace holds no names that begin with an underscore, and this is {name!r}")


class Dicts:
    """`dict`: makes dictionaries, and has no attributes to climb along."""

    def __call__(self, *values, **named) -> dict:
        return dict(*values, **named)

    def fromkeys(self, *values) -> dict:
        return dict.fromkeys(*values)


def raise_exception(message: object) -> None:
    raise Said(str(message))


def to_json(value: object, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Without the escapes for HTML that jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """What chat templates expect to find, as transformers offers it."""
    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = to_json
    found.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dicts(),
        "namespace": Names,
    }
    return found


def limit() -> None:
    """Bounds what this process may take from now on."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def render(template: str, variables: dict) -> dict[str, str]:
    """The answer for one request."""
    try:
        parts, length = [], 0
        for part in environment().from_string(template).generate(**variables):
            parts.append(part)
            length += len(part)
            if length > LONGEST:
                return {"fault": f"it writes more than {LONGEST} characters"}
        return {"text": "".join(parts)}
    except Said as said:
        return {"said": str(said)[:400]}
    except MemoryError:
        return {"fault": f"it takes more than {MEMORY >> 20} MB of memory"}
    except Exception as error:  # a template may raise whatever Python can
        return {"fault": f"{type(error).__name__}: {str(error)[:400]}"}


if __name__ == "__main__":
    request = json.load(sys.stdin)
    limit()
    answer = render(request["template"], request["variables"])
    sys.stdout.write(json.dumps(answer))
    sys.stdout.flush()
