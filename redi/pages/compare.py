"""`redi compare` as a page: the tables of the terminal, and samples on which the models differ."""

from collections.abc import Sequence
from pathlib import Path

from redi.evaluation.compare import Results, paired_table, score_table, shared, title
from redi.pages.html import write_page
from redi.pages.run import samples_of, score_bars


def write_compare_page(
    file: Path,
    folders: Sequence[Path],
    models: Results,
    *,
    baseline: str,
    published: bool = False,
) -> Path:
    """Writes the page of what `redi.evaluation.compare.load_models` has read from `folders`.

    Raises RediError for models that cannot be compared, and if the page cannot be written.
    """
    places = dict(zip(models, folders, strict=True))
    scores = score_table(models, published)
    sections = []
    for key in shared(models):
        results = {name: of_model[key] for name, of_model in models.items()}
        of_set = {name: folder / key for name, folder in places.items()}
        sections.append((title(key), score_bars(results), samples_of(results, of_set)))
    return write_page(
        file,
        "compare.html",
        title=" · ".join(models),
        scores=scores,
        foreign=[row[0] for row in scores.rows if row[0] not in models],
        tests=paired_table(models, baseline),
        sections=sections,
        places=places,
    )
