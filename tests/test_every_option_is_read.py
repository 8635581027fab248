"""No option is accepted and ignored: each field of each schema is read by the code that gets it.

The scan follows types: a parameter `config: PriorTrainingConfig` makes `config.steps` a read of that class's `steps`,
and so do its aliases, its blocks (`config.data.crop`) and the attributes that it is kept in (`self.config.steps`).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

import configs.evaluation
import configs.generation
import configs.sampling
import configs.schema
from configs.loading import options_of
from configs.pretrained import StrictConfig
from configs.sampling import SamplingOptions
from configs.schema import ImagePreprocessing
from configs.validation import Schema, field_hints
from prior import PRIOR_CONFIGS, PRIORS
from tokenizer import TOKENIZER_CONFIGS
from tokenizer.quantizers import QUANTIZERS, Quantizer

ROOT = Path(__file__).resolve().parent.parent
NOT_READS = {"validate", "check_options"}
"""Functions that look at a value without acting on it."""

DECLARED = vars(configs.schema) | vars(configs.generation) | vars(configs.evaluation)
SCHEMAS = [
    value for value in DECLARED.values() if inspect.isclass(value) and issubclass(value, Schema) and value is not Schema
]
BLOCKS = {hint for schema in SCHEMAS for hint in field_hints(schema).values() if hint in SCHEMAS}
BUILT = [s for s in SCHEMAS if s in BLOCKS or s is ImagePreprocessing or not s.__subclasses__()]
"""The schemas that are built themselves, rather than only through a subclass."""

SAMPLING_OPTIONS = sorted({prior.sampling_options for prior in PRIORS.values()}, key=lambda options: options.__name__)
MODEL_CONFIGS = {**TOKENIZER_CONFIGS, **PRIOR_CONFIGS}
SOURCES = [
    path.read_text()
    for layer in ("tokenizer", "prior", "pipelines", "scripts")
    for path in sorted((ROOT / layer).rglob("*.py"))
]

Types = dict[str, dict[str, str]]
"""Class name -> attribute -> name of the attribute's class, where that is a class of interest."""


def schema_types() -> Types:
    """The blocks inside schemas, and the classes of models' configs."""
    types: Types = {schema.__name__: {} for schema in SCHEMAS}
    for schema in SCHEMAS:
        for name, hint in field_hints(schema).items():
            if hint in SCHEMAS:
                types[schema.__name__][name] = hint.__name__
    for cls in MODEL_CONFIGS.values():
        for base in cls.__mro__[: cls.__mro__.index(StrictConfig)]:
            types[base.__name__] = {"preprocessing": "ImagePreprocessing"}
    return types


def annotated_class(annotation: ast.expr | None, types: Types) -> str | None:
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} if annotation else set()
    return next(iter(sorted(names & set(types))), None)


class Reads(ast.NodeVisitor):
    """Collects, for each class in `types`, the attributes that are read from values of it."""

    def __init__(self, types: Types) -> None:
        self.types = types
        self.found: dict[str, set[str]] = defaultdict(set)
        self.scope: dict[str, str] = {}

    def class_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.scope.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.types.get(self.class_of(node.value) or "", {}).get(node.attr)
        return None

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.scope = self.scope, self.scope | {"self": node.name}
        own = self.types.setdefault(node.name, {})
        for base in node.bases:
            own |= self.types.get(base.id, {}) if isinstance(base, ast.Name) else {}
        for item in node.body:
            match item:
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation):
                    if (cls := annotated_class(annotation, self.types)) is not None:
                        own[name] = cls
        self.generic_visit(node)
        self.scope = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in NOT_READS:
            return
        outer, self.scope = self.scope, dict(self.scope)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            if (cls := annotated_class(argument.annotation, self.types)) is not None:
                self.scope[argument.arg] = cls
        self.generic_visit(node)
        self.scope = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        cls = self.class_of(node.value)
        for target in node.targets if cls is not None else []:
            if isinstance(target, ast.Name):
                self.scope[target.id] = cls
            elif isinstance(target, ast.Attribute) and (owner := self.class_of(target.value)) is not None:
                self.types.setdefault(owner, {})[target.attr] = cls

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        cls = self.class_of(node.value)
        if cls is not None and isinstance(node.ctx, ast.Load):
            self.found[cls].add(node.attr)


def reads(sources: list[str], types: Types) -> dict[str, set[str]]:
    """Class name -> attributes read from values of that class."""
    visitor = Reads(types)
    # The first pass learns the attributes of classes that are defined below or in another file.
    for _ in range(2):
        for source in sources:
            visitor.visit(ast.parse(source))
    return visitor.found


@pytest.fixture(scope="module")
def read() -> dict[str, set[str]]:
    sources = [inspect.getsource(module) for module in (configs.schema, configs.generation, configs.sampling)]
    return reads([*SOURCES, *sources], schema_types())


def is_read(cls: type, field: str, found: dict[str, set[str]]) -> bool:
    return any(field in found.get(base.__name__, ()) for base in cls.__mro__)


@pytest.mark.parametrize(
    "key",
    [
        f"{schema.__name__}.{field.name}"
        for schema in BUILT
        for field in dataclasses.fields(schema)
        if not (issubclass(schema, SamplingOptions) and field.name in SamplingOptions.__dataclass_fields__)
    ],
)
def test_every_field_of_every_schema_is_read(key, read):
    name, _, field = key.partition(".")
    assert is_read(DECLARED[name], field, read), f"nothing reads {key}: use it or remove it"


@pytest.mark.parametrize(
    "key", [f"{cls.__name__}.{field.name}" for cls in SAMPLING_OPTIONS for field in dataclasses.fields(cls)]
)
def test_every_option_of_sampling_is_read(key, read):
    """Those of GenerationConfig are handed on to the prior's by name."""
    name, _, field = key.partition(".")
    (cls,) = (options for options in SAMPLING_OPTIONS if options.__name__ == name)
    assert is_read(cls, field, read), f"nothing reads {key}: use it or remove it"


@pytest.mark.parametrize(
    "key", [f"{name}.{option}" for name, cls in MODEL_CONFIGS.items() for option in options_of(cls)]
)
def test_every_option_of_every_model_is_read(key, read):
    name, _, option = key.partition(".")
    assert is_read(MODEL_CONFIGS[name], option, read), f"nothing reads model.{option} of {name}: use it or remove it"


def names_loaded(function) -> set[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}


def quantizer_constructors(name: str) -> list[type]:
    """The classes whose constructors take a quantizer's options: its own and those that `**options` go to."""
    return [owner for owner in QUANTIZERS[name].__mro__ if "__init__" in vars(owner) and issubclass(owner, Quantizer)]


def declared_by(owner: type) -> set[str]:
    parameters = inspect.signature(owner.__init__).parameters.values()
    return {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}


def acted_on(function) -> set[str]:
    """Names that a function loads other than to keep them, as in `self.depth = depth`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    kept = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)}
    loaded = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    return {node.id for node in loaded if id(node) not in kept}


def attributes_read(cls: type) -> set[str]:
    attributes = [n for n in ast.walk(ast.parse(inspect.getsource(cls))) if isinstance(n, ast.Attribute)]
    return {node.attr for node in attributes if isinstance(node.ctx, ast.Load)}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_option_of_every_quantizer_is_acted_on_by_its_constructor_or_kept_and_read(name):
    owners = [owner for owner in QUANTIZERS[name].__mro__ if "__init__" in vars(owner) and issubclass(owner, Quantizer)]
    read = set().union(*(attributes_read(owner) for owner in owners))
    declared: set[str] = set()
    for owner in owners:
        parameters = inspect.signature(owner.__init__).parameters.values()
        options = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
        assert options <= names_loaded(owner.__init__), owner.__name__
        assert options <= acted_on(owner.__init__) | read, owner.__name__
        declared |= options
    assert set(options_of(QUANTIZERS[name])) == declared


# The scan itself

EXAMPLE = """
class Loop:
    extra: DataConfig | None

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        config.written = 3

    def go(self):
        inner = self.config
        print(inner.through_alias, self.config.through_self, self.extra.through_class)

def work(config: TokenizerTrainingConfig, other: Elsewhere, loop: Loop):
    config.data.in_block
    (lambda: config.in_lambda)()
    other.foreign
    loop.config.through_object
    untyped.unknown
    untyped.config = config
    something.config.unknown

def validate(config: RunConfig):
    config.only_checked
"""


def test_the_scan_follows_annotations_aliases_blocks_and_attributes():
    found = reads([EXAMPLE], schema_types())
    assert found["RunConfig"] == {"through_alias", "through_self", "through_object"}
    assert found["TokenizerTrainingConfig"] == {"data", "in_lambda"}
    assert found["DataConfig"] == {"in_block", "through_class"}


def test_the_scan_sees_neither_checks_nor_writes_nor_other_classes():
    everything = set().union(*reads([EXAMPLE], schema_types()).values())
    assert not everything & {"only_checked", "written", "foreign", "unknown"}


def test_a_field_that_nobody_reads_is_found():
    @dataclasses.dataclass
    class Ignored(configs.schema.RunConfig):
        nobody_reads_me: int = 3

    found = reads(SOURCES, schema_types())
    assert not is_read(Ignored, "nobody_reads_me", found)
    assert is_read(Ignored, "learning_rate", found)
