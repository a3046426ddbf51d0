"""What an experiment says of itself: the saved view of its runs, and the note."""

import pytest
from mlflow.tracking import MlflowClient

from medspark.track.run_list import describe_experiment, run_list

NOTE = "mlflow.note.content"


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> MlflowClient:
    return MlflowClient(f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


def test_the_note_links_to_the_view(client: MlflowClient) -> None:
    experiment = client.create_experiment("new")

    describe_experiment(client, experiment)

    tags = client.get_experiment(experiment).tags
    assert run_list(experiment) in tags[NOTE]
    assert f"mlflow.sharedViewState.{run_list(experiment).partition('Key=')[2]}" in tags


def test_a_note_that_somebody_wrote_stays(client: MlflowClient) -> None:
    experiment = client.create_experiment("theirs", tags={NOTE: "ours: do not touch"})

    describe_experiment(client, experiment)

    assert client.get_experiment(experiment).tags[NOTE] == "ours: do not touch"
