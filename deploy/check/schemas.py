"""Schemas of Kubernetes objects for kubeconform, made from Kubernetes' own OpenAPI document and from CRDs.

    schemas.py DIR swagger.json CRD_DIR...

Keys that a schema does not know are refused.
"""

import json
import sys
from pathlib import Path

import yaml

PREFIX = "#/definitions/"

# A lone `=`, which YAML 1.1 gives a meaning of its own, is text.
yaml.SafeLoader.add_constructor("tag:yaml.org,2002:value", lambda loader, node: node.value)


def strict(schema, at_root=False):
    """The schema as JSON Schema has it: no unknown keys, and the types that OpenAPI has no word for."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("format") == "int-or-string" or schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if schema.get("x-kubernetes-preserve-unknown-fields"):
        return {"type": "object"}
    made = {key: strict(value) for key, value in schema.items() if not key.startswith("x-") and key != "description"}
    if "properties" in schema:
        made["properties"] = {key: strict(value) for key, value in schema["properties"].items()}
        made.setdefault("additionalProperties", False)
    # Formats of OpenAPI that are none of JSON Schema.
    made.pop("format", None)
    made.pop("nullable", None)
    return made


def references(schema):
    """The names of all definitions that the schema mentions."""
    if isinstance(schema, dict):
        if isinstance(schema.get("$ref"), str):
            yield schema["$ref"].removeprefix(PREFIX)
        for value in schema.values():
            yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def write(into, kind, group, version, schema):
    """Under the name that kubeconform looks for."""
    first = group.split(".")[0]
    parts = [kind, first, version] if first else [kind, version]
    (into / ("-".join(parts).lower() + ".json")).write_text(json.dumps(schema))


def kubernetes(into, swagger):
    definitions = json.loads(Path(swagger).read_text())["definitions"]
    made = {name: strict(schema) for name, schema in definitions.items()}
    made["io.k8s.apimachinery.pkg.api.resource.Quantity"] = {"type": ["string", "number"]}
    count = 0
    for name, schema in definitions.items():
        kinds = schema.get("x-kubernetes-group-version-kind", [])
        if len(kinds) != 1:
            continue
        needed, left = {}, [name]
        while left:
            one = left.pop()
            if one not in needed:
                needed[one] = made[one]
                left.extend(references(made[one]))
        root = {"$ref": PREFIX + name, "definitions": needed}
        write(into, kinds[0]["kind"], kinds[0]["group"], kinds[0]["version"], root)
        count += 1
    return count


def custom(into, directory):
    count = 0
    for path in sorted(Path(directory).glob("*.yaml")):
        for crd in yaml.safe_load_all(path.read_text()):
            if not crd or crd.get("kind") != "CustomResourceDefinition":
                continue
            spec = crd["spec"]
            for version in spec["versions"]:
                schema = strict(version["schema"]["openAPIV3Schema"])
                schema["properties"].update(
                    apiVersion={"type": "string"}, kind={"type": "string"}, metadata={"type": "object"}
                )
                write(into, spec["names"]["kind"], spec["group"], version["name"], schema)
                count += 1
    return count


def main():
    into = Path(sys.argv[1])
    into.mkdir(parents=True, exist_ok=True)
    count = kubernetes(into, sys.argv[2])
    for directory in sys.argv[3:]:
        count += custom(into, directory)
    (into / "complete").touch()
    print(f"check: {count} schemas")


main()
