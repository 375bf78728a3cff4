"""Every exception the package raises on purpose.

    RlaifError
        InputError (ValueError)       the user's config, data or model is wrong: exit code 2, one message
        DocumentError (ValueError)    JSON or YAML can't be read: whoever reads it says whose it is, and what follows
        RunError (RuntimeError)       the run failed: exit code 1
            EngineError               an inference engine could not start, or died
            ReplicasLostError         of engines or scorers none is left, and no new one came
            LearnerLostError          a learner rank died or went silent: the job goes on from its last checkpoint
            FeedbackError             too few completions could be scored to go on
            StaleWeightsError         a completion, or an engine, has other weights than it should
            MismatchError             engine, learner or saved folder compute the model differently
            NotFiniteError            loss, gradient or weights are NaN or infinite
            PlacementError            the cluster did not give the resources asked for in time
            CheckpointError           a checkpoint could not be written or read
                CheckpointTakenError  another process writes checkpoints in the same place by now

    Preempted (KeyboardInterrupt)     this process was told to end (SIGTERM): the step under way is given up

Messages say what, got, why and remedy. All of them pickle: they cross Ray's process borders with their type.
"""


class RlaifError(Exception):
    """Root of the package's own exceptions; takes one message."""


class InputError(RlaifError, ValueError):
    """The user's input is wrong. The message says what, got, why and the remedy; shown without a traceback."""


class DocumentError(RlaifError, ValueError):
    """JSON or YAML is broken, or beyond what is read of it.

    The message continues the name of the file: "is nested more than 100 deep". `line`, from 1, is where, if known.
    `syntax`: it is not JSON at all, rather than JSON beyond the bounds.
    """

    def __init__(self, message: str, line: int | None = None, *, syntax: bool = False) -> None:
        super().__init__(message)
        self.line, self.syntax = line, syntax


class RunError(RlaifError, RuntimeError):
    """The run failed though its input was right."""


class EngineError(RunError):
    """An inference engine could not start, or died."""


class ReplicasLostError(RunError):
    """No replica of a role is left, and no new one came in time."""


class LearnerLostError(RunError):
    """A learner rank died or went silent; its peers can't go on without it."""


class FeedbackError(RunError):
    """Fewer completions could be scored than `feedback.min_scored_fraction` allows."""


class StaleWeightsError(RunError):
    """A completion or an engine carries another weight version, or other weights, than the loop expects."""


class MismatchError(RunError):
    """An engine, the learner's batched computation or a saved folder gives other numbers than the model itself."""


class NotFiniteError(RunError):
    """A loss, a gradient or weights are NaN or infinite: nothing is learned from them, and nothing of them is kept."""


class PlacementError(RunError):
    """The cluster did not give the resources asked for in time."""


class CheckpointError(RunError):
    """A checkpoint could not be written, or does not fit what is to be resumed."""


class CheckpointTakenError(CheckpointError):
    """Another process has claimed the place of the checkpoints: this one must write no more there."""


class Preempted(KeyboardInterrupt):
    """The process was told to end, as by a scheduler that takes the node away: the step under way is given up."""
