"""`interp inspect`: what a model is made of, and how that was proved."""

from typing import Annotated

import typer


def inspect(
    model: Annotated[str, typer.Argument(help="A packaged model, a folder, or a hub id.")],
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...; default: the GPU if any.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16, bfloat16 or auto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print json.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the hub.")] = False,
) -> None:
    """Show a model's anatomy: towers, modules behind the sites, the proof's numbers, and every site refused."""
    import json

    from interp.cli.console import load
    from interp.cli.described import describe

    found = describe(load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code))
    if as_json:
        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
        return
    _print(found)


def _print(found: dict) -> None:
    from interp.cli.console import table

    typer.echo(f"{found['model']}: {found['class']}, {found['parameters']:,} parameters, {found['dtype']}")
    typer.echo(f"main tower: {found['main']}")
    typer.echo(f"embed:      {found['embed'] or 'not found'}")
    typer.echo(f"unembed:    {found['unembed'] or 'not found'}")
    if found["note"]:
        typer.echo(f"note:       {found['note']}")
    typer.echo()
    columns = ["tower", "layers", "heads", "kv heads", "d_model", "d_head", "container"]
    rows = [
        [t["name"], t["layers"], _few(t["heads"]), _few(t["kv_heads"]), t["d_model"], _few(t["d_head"]), t["container"]]
        for t in found["towers"]
    ]
    table("Towers", columns, rows, right=("layers", "heads", "kv heads", "d_model", "d_head"))
    rows = [[t["name"], b["layers"], b["kind"]] for t in found["towers"] for b in t["blocks"]]
    table("Blocks", ["tower", "layers", "kind"], rows)
    rows = [[t["name"], m["site"], m["layers"], m["module"]] for t in found["towers"] for m in t["modules"]]
    table("Where the sites are ({i}: the layer)", ["tower", "site", "layers", "module"], rows)
    rows = [[t["name"], what, f"{error:.1e}"] for t in found["towers"] for what, error in t["proof"].items()]
    table("Proof: largest relative error", ["tower", "identity", "error"], rows, right=("error",))
    if found["refused"]:
        rows = [[r["tower"], r["site"], r["layers"], r["reason"]] for r in found["refused"]]
        table("Refused sites", ["tower", "site", "layers", "why"], rows)
    else:
        typer.echo("Refused sites: none; every site can be read in every layer.")


def _few(values: list[int]) -> str:
    return ", ".join(map(str, values)) or "-"
