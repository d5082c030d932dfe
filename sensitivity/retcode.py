"""How a solve ended."""

from enum import IntEnum


class RetCode(IntEnum):
    """How a solve ended."""

    Success = 0
    MaxSteps = 1
    DtMin = 2
    NonFinite = 3
    NewtonFailure = 4
    Terminated = 5
    MaxEvents = 6
    GrazingEvent = 7
    SimultaneousEvents = 8
    EventAtSaveTime = 9
    Unstable = 10
    Memory = 11
    NotAutonomous = 12
    IndexTooHigh = 13
