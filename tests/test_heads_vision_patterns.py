"""Where heads of vision towers look: planted heads, plain loops over patches, towers of several layouts."""

import math

import pytest
import torch

import interp
from interp import edits, grids, heads
from interp.errors import InputError, SettingsError, UnknownNameError, UnsupportedError
from interp.heads.displacements import Displacements, ring_sums
from interp.heads.vision_patterns import displacement_sums
from interp.scores import load
from tests.conftest import packaged
from tests.zoo import build, inputs, processor


def grid_of(rows, cols):
    return torch.arange(rows).repeat_interleave(cols), torch.arange(cols).repeat(rows)


def naive(pattern, row, col):
    """Every number of one head on one picture, by loops over pairs: pattern [query, key] between patches."""
    rows, cols = int(row.max()) + 1, int(col.max()) + 1
    mass, pairs = torch.zeros(2 * rows - 1, 2 * cols - 1).double(), torch.zeros(2 * rows - 1, 2 * cols - 1).double()
    distance, uniform, rings = 0.0, 0.0, torch.zeros(max(rows, cols)).double()
    n = len(row)
    for i in range(n):
        whole = float(pattern[i].sum())
        for j in range(n):
            down, right = int(row[j] - row[i]), int(col[j] - col[i])
            weight = float(pattern[i, j]) / whole
            mass[down + rows - 1, right + cols - 1] += weight / n
            pairs[down + rows - 1, right + cols - 1] += 1 / n
            distance += weight * math.hypot(down, right) / n
            uniform += math.hypot(down, right) / n**2
            rings[max(abs(down), abs(right))] += weight / n
    aligned = mass / pairs
    total = float(aligned.sum())
    dy = sum(float(aligned[d].sum()) * (d - rows + 1) for d in range(2 * rows - 1)) / total
    dx = sum(float(aligned[:, r].sum()) * (r - cols + 1) for r in range(2 * cols - 1)) / total
    spread = 0.0
    for d in range(2 * rows - 1):
        for r in range(2 * cols - 1):
            spread += float(aligned[d, r]) / total * ((d - rows + 1 - dy) ** 2 + (r - cols + 1 - dx) ** 2)
    numbers = {
        "distance": distance,
        "relative": distance / uniform,
        "dx": dx,
        "dy": dy,
        "local": float(rings[:2].sum()),
    }
    return mass, aligned, rings, numbers | {"offset": math.hypot(dx, dy), "spread": math.sqrt(spread)}


def test_sums_over_displacements_by_hand():
    """A grid of 1 x 3: each query's keys to the left, itself, and to the right."""
    row, col = grid_of(1, 3)
    pattern = torch.tensor([[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0], [64.0, 128.0, 256.0]]])
    found = displacement_sums(pattern, row, col, 1, 3)
    assert found.tolist() == [[[64.0, 8.0 + 128.0, 1.0 + 16.0 + 256.0, 2.0 + 32.0, 4.0]]]
    row, col = grid_of(3, 1)
    assert displacement_sums(pattern, row, col, 3, 1)[0, :, 0].tolist() == [64.0, 136.0, 273.0, 34.0, 4.0]
    # In a larger frame the same numbers stand around the middle.
    framed = displacement_sums(pattern, row, col, 4, 2)
    assert framed.shape == (1, 7, 3)
    assert framed[0, :, 1].tolist() == [0.0, 64.0, 136.0, 273.0, 34.0, 4.0, 0.0]
    assert framed[0, :, [0, 2]].abs().sum() == 0


def test_sums_over_displacements_against_a_loop():
    row, col = grid_of(3, 5)
    order = torch.randperm(15, generator=torch.Generator().manual_seed(0))
    row, col = row[order], col[order]  # windows change the order of patches
    pattern = torch.rand(2, 15, 15, generator=torch.Generator().manual_seed(1))
    pattern = pattern / pattern.sum(-1, keepdim=True)
    found = displacement_sums(pattern, row, col, 3, 5)
    for head in range(2):
        mass, _, rings, _ = naive(pattern[head], row, col)
        torch.testing.assert_close(found[head].double() / 15, mass, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ring_sums(found)[head].double() / 15, rings, atol=1e-6, rtol=1e-5)


def planted(lens, monkeypatch, make):
    """The lens with head 2 of layer 1 looking where `make` puts it; everything else is as it was."""
    real = lens.run

    def run(batch, reads=(), change=(), **more):
        wanted = [reads] if isinstance(reads, (str, interp.Read)) else list(reads)
        if any(r.site == "pattern" and 1 in r.layers for r in map(interp.Read.of, wanted)):
            change = edits.splice(make, site="pattern", layers=1, heads=2, tower="vision")
        return real(batch, reads, change, **more)

    monkeypatch.setattr(lens, "run", run)


@pytest.fixture
def vit():
    given = inputs("vit")
    lens = interp.wrap(build("vit"), sample=given, name="vit")
    return lens, lens.prepare(**given)


def by_shift(lens, batch, down, right):
    """A pattern [query, key]: half on one displacement (on itself where the picture ends), half on the class token."""
    grid = grids.tower_patches(lens.model.config, batch.inputs)
    mine = [i for i, s in enumerate(grid.sequence.tolist()) if s == 0]
    place = {(int(grid.row[i]), int(grid.col[i])): int(grid.position[i]) for i in mine if grid.kind[i] == "patch"}
    pattern = torch.zeros(len(mine), len(mine))
    pattern[0, 0] = 1.0
    for (r, c), position in place.items():
        pattern[position, place.get((r + down, c + right), position)] = 0.5
        pattern[position, 0] = 0.5
    return pattern, len({r for r, _ in place}), len({c for _, c in place})


@pytest.mark.parametrize(("down", "right"), [(0, -1), (1, 0), (-1, 1)])
def test_a_head_that_looks_one_patch_aside(vit, monkeypatch, down, right):
    lens, batch = vit
    pattern, rows, cols = by_shift(lens, batch, down, right)
    planted(lens, monkeypatch, lambda p: pattern.expand_as(p).clone())
    maps = heads.displacements(lens, batch)
    reached = (rows - abs(down)) * (cols - abs(right))
    # Every query that has such a key looks at it and nowhere else; the rest look at themselves.
    assert float(maps.aligned[1, 2, rows - 1 + down, cols - 1 + right]) == pytest.approx(1.0)
    assert float(maps.aligned[1, 2, rows - 1, cols - 1]) == pytest.approx(1 - reached / (rows * cols))
    assert float(maps.aligned[1, 2].sum()) == pytest.approx(2 - reached / (rows * cols))
    row = maps.scores("spread").frame().set_index(["layer", "head"]).loc[(1, 2)]
    share = 1 / (2 - reached / (rows * cols))
    assert row["dx"] == pytest.approx(right * share, abs=1e-6)
    assert row["dy"] == pytest.approx(down * share, abs=1e-6)
    assert row["offset"] == pytest.approx(math.hypot(down, right) * share)
    assert row["spread"] == pytest.approx(math.hypot(down, right) * math.sqrt(share * (1 - share)), abs=1e-6)
    assert row["distance"] == pytest.approx(math.hypot(down, right) * reached / (rows * cols))
    assert row["local"] == pytest.approx(1.0)
    assert row["on_patches"] == pytest.approx(0.5)
    local = maps.offset_local(nearest=0.4)
    assert list(zip(local["layer"], local["head"], strict=True)) == [(1, 2)]
    assert local.attrs["tower"] == "vision"
    assert torch.isfinite(lens.run(batch, ["vision:z.1"], edits.scale_heads(local, 0.0))["vision:z", 1]).all()


def test_even_attention_is_what_relative_means(vit, monkeypatch):
    lens, batch = vit
    planted(lens, monkeypatch, lambda p: torch.full_like(p, 1 / p.shape[-1]))
    scores = heads.vision_patterns(lens, batch)
    row = scores.frame().set_index(["layer", "head"]).loc[(1, 2)]
    assert row["score"] == pytest.approx(1.0)
    assert row["offset"] == pytest.approx(0.0, abs=1e-6)
    # Of n x n patches on a square of side one it is about 0.52; here distances are counted in patches.
    far = torch.arange(40).double()
    apart = (far[:, None, None, None] - far[None, None, :, None]) ** 2 + (far[:, None, None] - far) ** 2
    assert float(apart.sqrt().mean()) / 40 == pytest.approx(0.521, abs=1e-3)
    maps = heads.displacements(lens, batch)
    torch.testing.assert_close(maps.mass[1, 2], maps.pairs / maps.pairs.sum(), atol=1e-6, rtol=1e-5)
    flat = maps.profile(per_patch=True)[1, 2]
    torch.testing.assert_close(flat, torch.full_like(flat, float(flat[0])), atol=1e-6, rtol=1e-5)


TOWERS = ["vit", "deit", "dinov2", "dinov2_with_registers", "clip", "siglip", "qwen2_5_vl", "mistral3", "llava_next"]


@pytest.mark.parametrize("name", TOWERS)
def test_towers_against_loops(name):
    given = inputs(name)
    lens = interp.wrap(build(name), sample=given, name=name)
    batch = lens.prepare(**given)
    maps = heads.displacements(lens, batch)
    grid = grids.tower_patches(lens.model.config, given)
    patch = torch.tensor([k == "patch" for k in grid.kind])
    pictures = grid.image.unique().tolist()
    assert len(maps) == len(pictures)
    trace = lens.run(batch, ["vision:pattern.1"])["vision:pattern", 1]
    same = len({(int(grid.row[patch & (grid.image == p)].max()), int((grid.image == p).sum())) for p in pictures}) == 1
    total = torch.zeros(maps.mass.shape[2:]).double()
    for n, picture in enumerate(pictures):
        mine = patch & (grid.image == picture)
        where = grid.position[mine]
        head = trace[int(grid.sequence[mine][0]), 3][where][:, where]
        mass, _, rings, numbers = naive(head.double(), grid.row[mine], grid.col[mine])
        assert float(maps.distance[n, 1, 3]) == pytest.approx(numbers["distance"], rel=1e-4)
        assert float(maps.rings[n, 1, 3, :2].sum()) == pytest.approx(numbers["local"], rel=1e-4)
        torch.testing.assert_close(maps.rings[n, 1, 3, : len(rings)].double(), rings, atol=1e-5, rtol=1e-4)
        relative = float(maps.distance[n, 1, 3] / maps.uniform[n])
        assert relative == pytest.approx(numbers["relative"], rel=1e-4)
        if same:
            total += mass / len(pictures)
    if same:
        torch.testing.assert_close(maps.mass[1, 3].double(), total, atol=1e-6, rtol=1e-4)
        if len(pictures) == 1:
            found = maps.scores("spread").frame().set_index(["layer", "head"]).loc[(1, 3)]
            for key in ("dx", "dy", "offset"):
                assert found[key] == pytest.approx(numbers[key], abs=1e-4)
    torch.testing.assert_close(maps.mass.sum((2, 3)), torch.ones(maps.mass.shape[:2]))
    kept = heads.displacements(lens, batch, memory=1)  # one layer to a run, entered at its stream
    for key in ("mass", "distance", "rings", "on_patches"):
        torch.testing.assert_close(getattr(kept, key), getattr(maps, key), atol=1e-5, rtol=1e-4)


def test_pictures_alone_and_together(vit):
    lens, batch = vit
    together = heads.displacements(lens, batch)
    alone = [heads.displacements(lens, one) for one in batch]
    torch.testing.assert_close(together.distance, torch.cat([m.distance for m in alone]), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.mass, torch.stack([m.mass for m in alone]).mean(0), atol=1e-6, rtol=1e-4)
    scores = together.scores("local")
    low, high = scores.interval()
    assert (low <= scores.scores).all()
    assert (scores.scores <= high).all()
    assert scores.per_prompt.shape == (2, *scores.scores.shape)
    assert together.scores("spread").per_prompt is None
    assert scores.tower == "vision"


@pytest.mark.slow
def test_dinov2_against_loops_and_looks_near_by():
    lens = packaged("dinov2-s")
    noise = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    wave = torch.sin(torch.arange(112) / 9)[None, :] * torch.cos(torch.arange(112) / 14)[:, None]
    batch = lens.prepare(pixel_values=torch.cat([noise, wave.expand(1, 3, 112, 112)]))
    maps = heads.displacements(lens, batch)
    assert maps.mass.shape == (12, 6, 15, 15)
    row, col = grid_of(8, 8)
    for layer, head in ((0, 0), (5, 3)):
        pattern = lens.run(batch, [f"vision:pattern.{layer}/{head}"])["vision:pattern", layer][:, 0, 1:, 1:]
        both = [naive(p.double(), row, col) for p in pattern]
        torch.testing.assert_close(maps.mass[layer, head].double(), (both[0][0] + both[1][0]) / 2, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(
            maps.aligned[layer, head].double(), (both[0][1] + both[1][1]) / 2, atol=1e-5, rtol=1e-4
        )
        wanted = (both[0][3]["distance"] + both[1][3]["distance"]) / 2
        assert float(maps.distance[:, layer, head].mean()) == pytest.approx(wanted, rel=1e-4)
    # Its offset-local heads: one patch up and one patch down.
    found = maps.offset_local().set_index(["layer", "head"])
    assert found.loc[(3, 4), "dy"] < -0.5
    assert found.loc[(3, 1), "dy"] > 0.5
    assert abs(found.loc[(3, 4), "dx"]) < 0.4


def test_maps_on_disk_and_as_pictures(vit, tmp_path):
    lens, batch = vit
    maps = heads.displacements(lens, batch)
    maps.save(tmp_path / "maps")
    again = load(tmp_path / "maps")
    assert again.equals(maps)
    assert again.scores("offset").equals(maps.scores("offset"))
    rows, cols = maps.mass.shape[2:]
    picture = maps.plot(1, 2).data[0]
    assert picture.z.shape == (rows, cols)
    assert picture.z[rows // 2, cols // 2] == pytest.approx(float(maps.aligned[1, 2, rows // 2, cols // 2]))
    assert maps.plot(-1, 0, reach=1).data[0].z.shape == (3, 3)
    assert "2 pictures" in repr(maps)
    for call in (lambda: maps.plot(9, 0), lambda: maps.scores("distances")):
        with pytest.raises(UnknownNameError):
            call()
    with pytest.raises(SettingsError, match="spread is positive"):
        maps.offset_local(spread=0.0)
    with pytest.raises(InputError, match="odd"):
        Displacements(maps.mass[..., 1:], maps.pairs[:, 1:], maps.distance, maps.rings, maps.on_patches, maps.uniform)


def test_what_has_no_patches():
    text = interp.wrap(build("llama"), processor("llama"), name="llama")
    with pytest.raises(InputError, match="no pictures"):
        heads.vision_patterns(text, text.prepare(["a"]))
    given = inputs("swin")
    windows = interp.wrap(build("swin"), sample=given, name="swin")
    with pytest.raises(UnsupportedError):
        heads.vision_patterns(windows, windows.prepare(**given))
    given = inputs("llava")
    lens = interp.wrap(build("llava"), sample=given, name="llava")
    with pytest.raises(InputError, match="no pictures"):
        heads.vision_patterns(lens, lens.prepare(input_ids=[[70, 71, 72]]))
    with pytest.raises(UnknownNameError, match="relative"):
        heads.vision_patterns(lens, lens.prepare(**given), score="relativ")
