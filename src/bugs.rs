//! The bank of seeded bugs: mistakes that somebody could make, which the tests must catch (`make bugs`, `docs/TESTING.md`).
//!
//! Contract: without the feature `bugs`, [`planted`] is `false` at compile time and what stands behind it is gone. With the
//! feature one mistake at a time is chosen at run time, for the calling thread. A build for use cannot carry the feature: where
//! debug assertions are off it does not compile.

#[cfg(all(feature = "bugs", not(debug_assertions)))]
compile_error!("the feature `bugs` is for tests alone: build with `--profile bugs`, or without the feature");

macro_rules! bugs {
    ($($name:ident $text:literal)*) => {
        /// A mistake.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $(#[doc = $text] $name,)*
        }

        impl Bug {
            /// The whole bank.
            pub const ALL: &[Bug] = &[$(Bug::$name),*];

            /// What is done wrong.
            pub const fn text(self) -> &'static str {
                match self { $(Bug::$name => $text,)* }
            }
        }
    };
}

bugs! {
    StripeOffByOne "a piece of a stripe goes one sector beyond its chunk"
    LinearBorder "a piece that crosses into the next node of a linear array is not split"
    SpanForgetsLastNode "a discard leaves out the last node"
    PartOffset "the second part of a request uses the data of the first"
    DiscardOutward "a discard is rounded outward to 4 KiB"
    IgnoreFua "a write that must be durable is sent as one that need not be"
    FlushSkipsNode "a flush leaves out the last node"
    FlushClearsAtSend "a flush clears what it is to cover when it is sent, not when it has succeeded"
    FlushFirstShardOnly "a flush looks at what the first shard has written, not at the others"
    FlushMarksAtEnd "a flush covers also what was written while it was on its way"
    NewDaemonClean "a new daemon takes it that its predecessor has left nothing unflushed"
    DiscardNotCounted "a discard is not counted as something to flush"
    RetryFailedFlush "a failed flush is tried again until it succeeds"
    CompleteTwice "a flush completes twice"
    LastResultWins "of a request's parts the last one's result counts, not the first error"
    ReadErrorIsData "a read that failed is completed as if it had succeeded"
    ReplyToWrongTag "an answer is taken for the oldest request of its kind"
    AckOnLoss "a write whose connection is lost is taken as done"
    ForgetOnLoss "what was under way on a lost connection is not sent again"
    ErrorOnLoss "a lost connection fails what was under way, instead of waiting for the server"
    DeadlineLeavesSession "a request past its deadline leaves its connection as it is"
    NoHold "a write past its deadline does not keep others from the target"
    HoldEndsAtDown "a target is free again when the connection is closed, not when HELLO confirms"
    IgnoreHold "what waits is sent though the target is held"
    SendPastDeadline "a write that waits is sent although its request has failed"
    NoDeadline "a request waits for its server for ever"
    ShutdownIsError "the answer of a server that is being stopped is taken for the result"
    SilenceIgnored "a connection on which nothing comes back is never given up"
    ConnectForever "a HELLO that is not answered is waited for, for ever"
    ReconnectGivesUp "a link is not tried again after a few failures"
    SilentNodeStarves "requests of a node that does not answer use up what those of another need"
    WaitingForgotten "a request that waits for a further part is forgotten when its last one ends"
    DamagedIsData "data that arrived damaged is taken"
    ServerTakesDamaged "the server writes data that arrived damaged"
    UnboundChecksum "the checksum of data does not cover where it belongs"
    EnospcIsEio "a full disk is reported as a broken one"
    ServerAcksEarly "the server answers a write before its disk has it"
    ServerIgnoresFua "the server does not make durable what must be"
    WriteThroughIgnored "a volume that is to be written through answers writes that are not durable"
    ServerFuaZero "the server answers a durable zeroing before it is flushed"
    ServerStartsClean "a new server takes it that nothing is unflushed"
    ServerJoinsSync "a flush is answered with a sync that began before the writes it must cover"
    ServerSyncCoversAll "a sync covers also what was written while it ran"
    WelcomeEarly "HELLO is answered while work of the former connection is on the disk"
    PredecessorServed "a HELLO leaves its channel's former connection in service"
    ClaimNotAwaited "HELLO is answered before its claim is durable"
    ClaimForgotten "a new server does not know who has its volumes"
    EqualEpochTaken "a claim of the same epoch by another owner is accepted"
    FencedIsFailed "a target that another owner has taken is left like one that has failed, and the array goes on without it"
    FencedGoesOn "an array of which another owner has taken a volume goes on with its other nodes"
    TakeOverOfSome "a take-over serves although a replica has not accepted it"
    LabelsLookedAtOnce "a take-over does not look again at the labels when it has claimed everything"
    FormerNotDrained "a claim is welcome while requests of the former host are under way"
    FormerStillServed "a claim leaves the connections of the former host in service"
    ImportByAnyLabel "an import goes by the first label that it finds"
    ImportTrustsAll "an import takes all replicas that a label names as in sync"
    LabelFromAnyone "a label is taken from a host that has no claim any more"
    OldRecordTrusted "an array is started from a record that is older than its labels"
    OldRecordIsClean "a record that says that the array was stopped in order is believed although another host has had it since"
    RecordPastLabels "a change of replicas that only the record knows is believed although another host has had the array since"
    SplitIsSame "replicas of which neither came from the other are taken as in sync"
    FlushFailureForgotten "a new server does not know that a flush has failed"
    FailureTellsNobody "a new server does not know that a flush has failed whose client had gone"
    LossNotCounted "a server whose machine has lost its memory does not say so"
    LossCountedAtWrite "a write is answered before it is written down that there are writes to lose"
    MarkAfterWrite "a write goes to the disk before its region is marked there"
    RegionCleanedEarly "a region is cleaned though it was written after what the client has flushed everywhere"
    RegionCleanedUnderWay "a region is cleaned while a write of it is under way"
    PointToldEarly "a server is told at once that what it had at its last flush is flushed everywhere"
    PointWhileStale "points are proven while a replica lacks writes"
    PointIgnoresFlight "a point is proven though writes were in flight when it was noted"
    ForgetStatus "a change whose answer was lost is carried out a second time"
    OverlapIgnored "overlapping writes are in flight together on a node with several targets"
    OneReplicaWritten "a write is acknowledged when the first replica alone was sent it"
    ReadFromStale "a replica that lacks writes is read"
    AckDegradedEarly "a write that a replica missed is acknowledged before that is durably known"
    DivergenceIgnored "a write that failed on some replicas leaves them different"
    SlowReplicaStalls "a replica that does not answer is waited for"
    WindowIgnored "a region is copied while writes to it are in flight"
    WindowWantsTurn "a shard that waits for a window to close asks for the turn, which only makes others wait and look"
    WindowClosedEarly "writes to a region go on before its copy has landed"
    UncleanIsClean "replicas that differ after a crash are all taken as in sync"
    StaleForgotten "a stale replica is taken as in sync after a restart"
    SequenceReused "a second sync uses the sequences of the first again, whose statuses the server remembers"
    LossIgnored "a replica whose machine came back without acknowledged writes is read"
    LossForgottenAtRestart "a new daemon takes replicas as whole whose machines lost acknowledged writes while no daemon ran"
    LateLossForgotten "a node that comes late is taken as whole although its machine lost acknowledged writes while no daemon ran"
    LateReplicasAlike "of a node that comes late all replicas in sync are taken for the same, whatever was in flight"
    LateIsClean "an array is said to have been stopped in order while one of its nodes was late"
    AcceptLossNotDurable "that the loss of acknowledged writes was accepted is forgotten with the daemon"
    FlushSkipsSyncing "a flush leaves out the replica that is syncing, which is in sync a moment later"
    ResyncSkipsLast "the last region is not copied"
    FrozenStillSends "what had begun goes on while its node is suspended"
    ParkedHasDeadline "a request that waits at a gate times out"
    LoneHindersLeave "what waits at a suspended node since that had one target alone keeps another one from leaving it, and flushes elsewhere wait"
    SuspendWithoutFlush "a suspended node is not flushed, so that flushes elsewhere wait for it"
    AbortLeavesGate "requests wait for ever after a cut-over that has failed"
    RollBackForgetsWrites "what is written after a cut-over was rolled back is not on the destination"
    SourceNotSpared "a slow source of a move is asked again at once, so that writes wait for its region all the time"
    CandidateJoins "a destination that is not filled is taken as in sync after a restart"
    ParkedForgotten "a request that has waited at a gate is forgotten when it opens"
    FreshNotFresh "what reads as zeros is not copied to a volume that does not"
    ResumeForgetsStale "a resume takes stale replicas as in sync"
    StopIsFlush "after an orderly stop replicas are taken as the same although not all of it was flushed"
    ReportsMixed "that a node has diverged is not told when one of its targets was reported already"
    CutOverBeforeDrained "the destination takes the place while writes to the source are in flight"
    CursorOffByOne "of a copy that was interrupted one region too many is believed"
    CursorBeforeFlush "of a copy that was interrupted is believed what was not flushed"
    SourceNotGrounded "a copy is believed although its source may lose what was read there, and no log knows of it"
    LogCleanedUnderOpenMove "region logs are cleaned before the destination of a move has come back that lacks what they have marked"
    UnloggedAfterRestart "what is written before the destination of a move has come back is in no region log"
    AwaitedForgotten "what a replica is copied before the destination of a move has come back is in no region log"
    CursorOfAnotherHost "what was copied is believed although another host has used the array since"
    SurveySkipsLast "of each run of marked regions the last one is not copied"
    StaleMarksIgnored "what a stale replica itself has marked is not copied"
    FillingIsStale "of a replica that was never filled only what is marked is copied"
    ScrubSkipsLast "a scrub does not compare the last region"
    ScrubMissesThird "a scrub compares the first two replicas alone"
    RepairFromWrong "a repair takes what it writes from another replica than the one that is right"
    GrownTooEarly "an array is said to have grown before every shard works with the larger layout"
    GrowsDoubtful "a node of several replicas grows at once, although nobody knows what they hold behind its former end"
    SealAwaited "a scrub that is to end waits until what it has put right is flushed, also by a dead server, and so do requests"
    RepairClosesEarly "writes to a region go on before its repair has landed"
    ResyncMissesWrites "writes to what is copied already do not go to the replica that is syncing"
}

/// Whether this mistake is to be made.
#[cfg(not(feature = "bugs"))]
#[inline(always)]
pub const fn planted(_: Bug) -> bool {
    false
}

#[cfg(feature = "bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Whether this mistake is to be made.
#[cfg(feature = "bugs")]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Chooses the mistake that this thread makes from now on.
#[cfg(feature = "bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}
