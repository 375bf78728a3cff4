"""What a job reads, by content: everything that its config names and results depend on.

Found by the declarations of the config's schema (`config/roles.py`). Looked at before a job reads anything, kept beside
its results (`pipelines/settings.py`), compared when it goes on there, and looked at again when it ends.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from rlaif_ray.config.roles import Setting, settings
from rlaif_ray.data.identity import Content, changes, clock_time, data_content, file_content, model_content
from rlaif_ray.errors import RunError
from rlaif_ray.feedback.principles import load_constitution
from rlaif_ray.feedback.revision import load_examples
from rlaif_ray.feedback.templates import load_exemplars, load_template

if TYPE_CHECKING:
    from pydantic import BaseModel


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a job reads, as it was when the job began."""

    config: BaseModel
    contents: dict[str, Content]  # by dotted key
    began_at: float  # seconds since the epoch

    def note_commits(self) -> None:
        """To be called once the inputs were read: what is on the hub may have come at a newer commit than the local
        cache had when they were looked at."""
        for key, now in contents(self.config).items():
            if key in self.contents and now.digest == self.contents[key].digest:
                self.contents[key] = now

    def check(self, kept: Path) -> None:
        """Looks at all of it again.

        Args:
            kept: what was made of it, for the message.

        Raises:
            RunError: some of it is not what it was when the job began.
        """
        changed = list(changes(self.contents, contents(self.config)))
        if changed:
            raise RunError(
                f"an input was replaced while the job ran, which began {clock_time(self.began_at)}. "
                f"{'; '.join(changed)}. What was made before and after that does not belong together: {kept} is not "
                f"finished. Restore the input and start the same command again, or name another run_dir or output to "
                f"work on the new one."
            )


def look_at(config: BaseModel) -> Inputs:
    """What a job reads, now.

    Raises:
        InputError: a file can't be read, or a template, constitution or the like is wrong.
    """
    return Inputs(config, contents(config), time.time())


def result_settings(config: BaseModel) -> Iterator[Setting]:
    """The settings that results depend on."""
    return (one for one in settings(config) if one.role.result)


def contents(config: BaseModel) -> dict[str, Content]:
    """Of everything that a config names and results depend on, by dotted key.

    Raises:
        InputError: a file can't be read, or a template, constitution or the like is wrong.
    """
    return {
        ".".join(one.key): content_of(config, one)
        for one in result_settings(config)
        if one.names is not None and one.value is not None
    }


def content_of(config: BaseModel, setting: Setting) -> Content:
    """What a setting that names something names.

    Raises:
        InputError: it can't be read, or is wrong.
    """
    assert setting.names is not None
    section: Any = config
    for part in setting.key[:-1]:
        section = section[part] if isinstance(section, Mapping) else getattr(section, part)
    match setting.names.kind:
        case "data":
            return data_content(setting.value, getattr(section, "split", "train"))
        case "model":
            return model_content(setting.value, getattr(section, "revision", None))
        case "text":
            said = _said(section, setting)
            digest = xxh3_128_hexdigest(json.dumps(said, sort_keys=True).encode())
            return Content(setting.value, digest, changed_at=file_content(setting.value).changed_at)


def _said(section: Any, setting: Setting) -> Any:
    """What a template or the like says: where its file lies and what comments say doesn't matter."""
    assert setting.names is not None
    name = setting.value
    match setting.names.text:
        case "score template":
            return load_template(name).hash
        case "preference template":
            return load_template(name, kind="preference").hash
        case "exemplars":
            template = load_template(section.template, kind="preference")
            return [asdict(one) for one in load_exemplars(name, template)]
        case "constitution":
            return load_constitution(name, ".".join(setting.key)).hash
        case _:
            assert setting.names.text == "revision examples", setting.names
            return [asdict(one) for one in load_examples(name)]
