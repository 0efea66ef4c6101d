"""Rules for overlays by directory."""

import os
from pathlib import Path

import pytest

from nbdq.admin.policies import Policies, PolicyError
from nbdq.qcow2.create import CreateOptions

EXAMPLE = """
[[directory]]
path = "{root}"
compat = "0.10"
templates = ["*.template"]

[[directory]]
path = "{root}/big"
cluster_size = "2M"
refcount_bits = 1
lazy_refcounts = true
templates = ["golden/*"]
"""


def _load(tmp_path: Path, text: str) -> Policies:
    path = tmp_path / "policy.toml"
    path.write_text(text)
    return Policies.load(str(path))


def test_the_longest_directory_decides_and_elsewhere_nothing_is_said(tmp_path: Path) -> None:
    policies = _load(tmp_path, EXAMPLE.format(root=tmp_path))
    outer = CreateOptions(size=0, **policies.overlay_options(str(tmp_path / "x")))
    inner = CreateOptions(size=0, **policies.overlay_options(str(tmp_path / "big" / "deep" / "x")))
    assert (outer.version, outer.cluster_size, outer.refcount_bits, outer.lazy_refcounts) == (2, 65536, 16, False)
    assert (inner.version, inner.cluster_size, inner.refcount_bits, inner.lazy_refcounts) == (3, 2 << 20, 1, True)
    assert policies.overlay_options(str(tmp_path) + "x/y") == {}
    assert Policies().overlay_options("/x") == {}


def test_templates_are_found_by_their_names_below_the_directory_through_links_too(tmp_path: Path) -> None:
    policies = _load(tmp_path, EXAMPLE.format(root=tmp_path))
    (tmp_path / "big" / "golden").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "big" / "golden" / "a")
    for path in (tmp_path / "b.template", tmp_path / "big" / "golden" / "a", tmp_path / "link"):
        assert policies.is_template(str(path))
    for path in (tmp_path / "b.qcow2", tmp_path / "big" / "a", tmp_path / "big" / "b.template"):
        assert not policies.is_template(str(path))
    assert not policies.is_template("/elsewhere/b.template")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x =", "Invalid value"),
        ("x = 1", "unknown key 'x'"),
        ("directory = 1", "[[directory]]"),
        ("directory = [1]", "number 1"),
        ("[[directory]]", "'path' is missing"),
        ('[[directory]]\npath = "relative"', "absolute"),
        ('[[directory]]\npath = "/a"\ncluster_size = 1000', "power of two"),
        ('[[directory]]\npath = "/a"\ncluster_size = "64q"', "64q"),
        ('[[directory]]\npath = "/a"\ncompat = "1.2"', "'compat' does not accept value '1.2'"),
        ('[[directory]]\npath = "/a"\nrefcount_bits = 3', "refcount_bits is 3"),
        ('[[directory]]\npath = "/a"\ncompat = "0.10"\nlazy_refcounts = true', "lazy_refcounts"),
        ('[[directory]]\npath = "/a"\nclusters = 1', "'clusters' is unexpected"),
        ('[[directory]]\npath = "/a"\ntemplates = "x"', "expected: array"),
        ('[[directory]]\npath = "/a"\n[[directory]]\npath = "/a/"', "two rules"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(PolicyError) as error:
        _load(tmp_path, text)
    assert reason in str(error.value)
    assert "policy.toml" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    path.write_bytes(os.urandom(64) + b"\xff")
    with pytest.raises(PolicyError):
        Policies.load(str(path))
