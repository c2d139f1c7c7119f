/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The commit: at every instant at most one side runs the guest, and what each side says in the
 * end is true.
 *
 * Source and destination do what lib/source.c and lib/destination.c do, from the rounds on, over
 * a control connection as lib/control.c has it; when an engine is killed, the front process of
 * kmig sets right what can be (died() in tools/kmig/migrate.c and receive.c). What fills the
 * messages is left out: one round stands for all before the pause and one for all after it, and
 * whether digests are lacking is anybody's guess.
 *
 * Anything may go wrong at any step, in any combination: see world() at the end.
 *
 * Assumed: TCP delivers what was handed over in order, or from some byte on not at all; nobody
 * understands half a message, and none is forged (seals); the source's VMM resumes a guest it
 * paused; a front dies with its host only.
 *
 * As it stands, time-outs strike only where the peer cannot be heard or does not answer, so that
 * a wait which lacks one shows as a deadlock. With STALLS they strike at any time: either side may
 * be stopped for as long as it takes.
 *
 * A step is atomic where others can see but one thing of it. The macros in capitals that are
 * not defined here break a rule each, or ask whether something can happen: see ./check.
 */

mtype = {
	/* messages; ROUND stands for what the data channels carry */
	ROUND, ROUND_ACK, PAUSED, PREPARE, NEED, READY, COMMIT, RUNNING, DONE,
	ABORT, ABORT_NOT_RUN, KEEPALIVE,
	/* how else a wait ends */
	NOTHING, LOST, SILENCE, FAILURE,
	/* verdicts; a cancelled migration has failed */
	UNDER_WAY, COMPLETED, FAILED, UNKNOWN,
	/* who dies */
	NOBODY, ENGINE, HOST
};

#define NEEDS_MAX	1	/* digests asked for again; four times in the library */
#define ANSWER_SIGNS	1	/* signs of life after which an answer is due */

/* ---- What happens to them ---- */

bool calm;			/* from now on nothing more goes wrong */
bool dark;			/* the network between is gone, and nobody is told */
mtype source_dies = NOBODY, destination_dies = NOBODY;
bool fault;			/* something has gone wrong that is neither an abort nor a plain error */

/* ---- The control connection ---- */

chan data = [1] of { mtype };
chan to_source = [4] of { mtype };
chan to_destination = [4] of { mtype };
bool source_shut, destination_shut;	/* for sending: the peer reads to the end and sees it */
bool source_closed, destination_closed;	/* nobody reads there any more */
bool source_reset, destination_reset;	/* a reset on the way to this side: it may overtake data */
bool source_broken, destination_broken;	/* half a message has left: nothing may follow */

hidden mtype got;			/* what await() has found; used within the same atomic */

/* ---- The guest, and what is said of it ---- */

bool source_runs = true, destination_runs;
bool ran_there;			/* at the destination, ever */
bool handed_over;		/* COMMIT, whole */
bool commit_came;
bool asked;			/* PREPARE was sent, or may have been */
bool source_host_died, destination_host_died;
mtype source_verdict = UNDER_WAY, destination_verdict = UNDER_WAY;
bool source_front;		/* it is the front that judges */
bool source_over, destination_over;
bool destination_busy;		/* its VMM works, and signs of life come all the same */

#define BOTH_OVER	(source_over && destination_over)

#ifdef STALLS
#define SILENT	true
#elif defined(NO_SILENCE_LIMIT)
#define SILENT	false
#else
#define SILENT	dark
#endif

/*
 * send_locked(): no error only when the whole message was given to the network, which may lose
 * it nevertheless.
 */
inline transmit(message, out, broken, peer_closed, own_reset)
{
	if
	:: broken -> err = LOST
	:: !broken && !dark && !peer_closed -> out!message; err = NOTHING
	:: !broken && (dark || peer_closed) ->
		own_reset = own_reset || peer_closed;
		err = NOTHING
	:: !broken && (dark || peer_closed || own_reset) -> broken = true; err = LOST
	/* No room for the rest of it, until it is too late. */
	:: !broken && !calm -> fault = true; broken = true; err = SILENCE
	fi;
}

/*
 * The next thing that happens to who waits. A failure may be anything of its own: an abort, a
 * lost data channel, memory, a digest that differs.
 */
inline await(in, peer_shut, own_reset, fails)
{
	if
	:: in?got
	:: peer_shut && !dark && empty(in) -> got = LOST
	:: own_reset -> got = LOST
	:: SILENT -> got = SILENCE; fault = true
	:: fails && !calm -> got = FAILURE
	fi;
}

/*
 * kmig_control_last_words(): the connection is gone, but the peer's ABORT may be there to read.
 * Whatever else is, is passed over.
 */
inline last_words(in)
{
	atomic {
		do
		:: err == LOST && !peer_aborted && nempty(in) ->
			in?got;
			peer_aborted = got == ABORT || got == ABORT_NOT_RUN
		:: break
		od
	}
}

/* Nobody will read it. */
inline drain(in)
{
	do
	:: nempty(in) -> in?_
	:: empty(in) -> break
	od
}

/*
 * kmig_control_close(): who has sent ABORT waits for the peer to hang up, for a while. Closing
 * with something unread resets the connection, which can overtake what was sent last.
 */
inline hang_up(in, shut, closed, peer_shut, peer_reset, peer_busy, aborted)
{
	shut = true;
#ifndef HANGS_UP_AT_ONCE
	do
	:: aborted && !peer_shut && !peer_busy && nempty(in) -> in?_
	:: !aborted || peer_shut || dark || peer_busy -> break
#ifdef STALLS
	:: true -> fault = true; break
#endif
	od;
#endif
	atomic { peer_reset = peer_reset || nempty(in); closed = true; drain(in) }
}

/* ---- The source ---- */

inline source_send(message)
{
	transmit(message, to_destination, source_broken, destination_closed, source_reset)
	if
	:: err != NOTHING -> goto give_up
	:: else
	fi
}

/* step(): one message. @answer: one is due, however alive the peer is. */
inline source_wait(answer, may_fail)
{
	await(to_source, destination_shut, source_reset, may_fail)
	if
	:: got == ABORT || got == ABORT_NOT_RUN -> peer_aborted = true; err = got
	:: got == LOST || got == SILENCE || got == FAILURE -> err = got
#ifndef NO_ANSWER_LIMIT
	:: got == KEEPALIVE && answer && signs == ANSWER_SIGNS -> err = SILENCE
	:: got == KEEPALIVE && answer && signs != ANSWER_SIGNS -> signs++
	:: got == KEEPALIVE && !answer
#else
	:: got == KEEPALIVE
#endif
	:: else
	fi
}

/* What comes must be @message: nobody here sends what has no place. */
inline source_expect(message, answer, may_fail)
{
	do
	:: atomic {
		source_wait(answer, may_fail);
		if
		:: err != NOTHING || got == message -> signs = 0; break
		:: else -> assert(got == KEEPALIVE)
		fi
	   }
	od
}

active proctype source()
{
	mtype err = NOTHING;
	byte signs;
	bool peer_aborted, aborted, paused, committed, completed;

	{
		/* Rounds while the guest runs. */
		data!ROUND;
		source_expect(ROUND_ACK, false, true);
		if
		:: err != NOTHING -> goto give_up
		:: else
		fi;

		/* Blackout. */
		atomic {
			paused = true;
			if
			:: !calm -> err = FAILURE; goto give_up
			:: !calm -> source_runs = false; err = FAILURE; goto give_up
			:: source_runs = false
			fi
		}
		atomic { source_send(PAUSED) }
		data!ROUND;
		source_expect(ROUND_ACK, true, true);
		if
		:: err != NOTHING -> goto give_up
		:: else
		fi;

		/* Check. */
		do
		:: atomic { asked = true; source_send(PREPARE) }
			do
			:: atomic {
				source_wait(true, true);
				if
				:: err != NOTHING -> goto give_up
				:: err == NOTHING && got == NEED -> signs = 0; break
				:: err == NOTHING && got == READY -> signs = 0; goto commit
				:: err == NOTHING && got == KEEPALIVE
				fi
			   }
			od;
		od;

commit:		/* The last look at whether to abort; then only a COMMIT that left whole commits. */
		if
		:: !calm -> err = FAILURE; goto give_up
		:: true
		fi;
		atomic {
			transmit(COMMIT, to_destination, source_broken, destination_closed, source_reset)
			if
			:: err == NOTHING -> handed_over = true; committed = true
#ifdef HALF_COMMITS
			:: err != NOTHING -> committed = true; goto give_up
#else
			:: err != NOTHING -> goto give_up
#endif
			fi
		}

		/* Too late to change one's mind. */
		source_expect(RUNNING, true, false);
		atomic {
			if
			:: err == NOTHING
#ifdef RESUMES_AFTER_COMMIT
			:: err != NOTHING -> committed = false; goto give_up
#elif defined(ANY_ABORT_RESUMES)
			:: err == ABORT || err == ABORT_NOT_RUN -> committed = false; goto give_up
			:: err == LOST || err == SILENCE -> goto give_up
#elif defined(DEAF_TO_NOT_RUN)
			:: err != NOTHING -> goto give_up
#else
			:: err == ABORT_NOT_RUN -> committed = false; goto give_up
			:: err != NOTHING && err != ABORT_NOT_RUN -> goto give_up
#endif
			fi;
			source_verdict = COMPLETED;
			completed = true
		}
		atomic { transmit(DONE, to_destination, source_broken, destination_closed, source_reset) }
		goto leave;

give_up:
		if
		:: committed -> source_verdict = UNKNOWN; goto leave
		:: else
		fi;
		last_words(to_source);
		if
		:: paused -> source_runs = true; paused = false
		:: else
		fi;
		atomic {
			source_verdict = FAILED;
			if
			:: !peer_aborted ->
				aborted = true;
				transmit(ABORT, to_destination, source_broken, destination_closed, source_reset)
			:: else
			fi
		}
leave:
		hang_up(to_source, source_shut, source_closed, destination_shut, destination_reset,
			destination_busy, aborted)
	} unless {
		atomic {
			source_dies != NOBODY;
			source_shut = true;
			source_closed = true;
			destination_reset = destination_reset || nempty(to_source);
			drain(to_source);
			if
			:: source_dies == HOST -> dark = true; source_runs = false; source_host_died = true
			:: else -> source_front = true
			fi
		}
		/* died() */
		if
		:: source_dies == HOST
		:: source_dies == ENGINE && completed -> source_verdict = COMPLETED
#ifdef FRONT_RESUMES_ALWAYS
		:: source_dies == ENGINE && !completed ->
#else
		:: source_dies == ENGINE && !completed && paused && asked -> source_verdict = UNKNOWN
		:: source_dies == ENGINE && !completed && !(paused && asked) ->
#endif
			atomic { source_runs = true; source_verdict = FAILED }
		fi
	}
	d_step {
		source_over = true;
		/* What nobody will look at any more does not make a state another. */
		err = NOTHING; signs = 0;
		peer_aborted = false; aborted = false; paused = false; committed = false; completed = false
	}
}

/* ---- The destination ---- */

inline destination_send(message)
{
	transmit(message, to_source, destination_broken, source_closed, destination_reset)
	if
	:: err != NOTHING -> goto give_up
	:: else
	fi
}

inline destination_wait(may_fail)
{
	await(to_destination, source_shut, destination_reset, may_fail)
	if
	:: got == ABORT -> peer_aborted = true; err = got
	:: got == LOST || got == SILENCE || got == FAILURE -> err = got
	:: else
	fi
}

/* The VMM takes as long as it likes. Meanwhile a thread says that we live. */
inline vmm_works()
{
	if
	:: true
	:: atomic { !calm -> fault = true; destination_busy = true }
		do
		:: atomic { !dark && !source_closed && !destination_broken && empty(to_source) -> to_source!KEEPALIVE }
		:: destination_busy = false; break
		od
	fi
}

active proctype destination()
{
	mtype err = NOTHING;
	byte needs;
	bool peer_aborted, aborted, told, blackout;

	{
		/* Rounds, until all is here and agrees. */
		do
		:: atomic { data?ROUND -> destination_send(ROUND_ACK) }
		:: atomic {
			destination_wait(true);
			if
			:: err != NOTHING -> goto give_up
			:: err == NOTHING && got == PAUSED -> assert(!blackout); blackout = true
			:: err == NOTHING && got == PREPARE -> assert(blackout); break
			fi
		   }
		od;

		/* The data channels are closed; digests that are lacking are asked for. */
		do
		:: atomic { !calm -> err = FAILURE; goto give_up }
		:: atomic { needs < NEEDS_MAX -> needs++; destination_send(NEED) }
			atomic {
				destination_wait(true);
				if
				:: err != NOTHING -> goto give_up
				:: else -> assert(got == PREPARE)
				fi
			}
		:: break
		od;

		/* Load; then the last look at whether to abort. */
		vmm_works();
		if
		:: !calm -> err = FAILURE; goto give_up
		:: true
		fi;
		atomic { destination_send(READY) }
#ifndef RUNS_ON_READY
		atomic {
			destination_wait(true);
			if
			:: err != NOTHING -> goto give_up
			:: else -> assert(got == COMMIT); commit_came = true
			fi
		}
#endif

		/* Take over: nothing stops us any more. */
#ifndef FRONT_IS_TOLD_LATE
		told = true;
#endif
		vmm_works();
		atomic {
			if
			:: destination_runs = true; ran_there = true
			/* The VMM says that it failed; who knows whether that is true. */
			:: !calm -> fault = true; err = FAILURE
			:: !calm -> fault = true; err = FAILURE; destination_runs = true; ran_there = true
			fi
		}
		told = true;
		atomic {
			if
			:: err == NOTHING -> destination_verdict = COMPLETED
			:: else -> destination_verdict = UNKNOWN
			fi
		}
		atomic {
			if
			:: err == NOTHING ->
				transmit(RUNNING, to_source, destination_broken, source_closed, destination_reset)
			:: else ->
				aborted = true;
#ifdef LIES_OF_NOT_RUN
				transmit(ABORT_NOT_RUN, to_source, destination_broken, source_closed, destination_reset)
#else
				transmit(ABORT, to_source, destination_broken, source_closed, destination_reset)
#endif
			fi
		}
		/* DONE, or whatever ends the wait for it. */
		if
		:: err == NOTHING && !aborted -> destination_wait(false)
		:: else
		fi;
		goto leave;

give_up:
		last_words(to_destination);
		atomic {
			destination_verdict = FAILED;
			if
			:: !peer_aborted ->
				aborted = true;
				transmit(ABORT_NOT_RUN, to_source, destination_broken, source_closed, destination_reset)
			:: else
			fi
		}
leave:
		hang_up(to_destination, destination_shut, destination_closed, source_shut, source_reset, false, aborted)
	} unless {
		atomic {
			destination_dies != NOBODY;
			destination_busy = false;
			destination_shut = true;
			destination_closed = true;
			source_reset = source_reset || nempty(to_destination);
			drain(to_destination);
			if
			:: destination_dies == HOST ->
				dark = true; destination_runs = false; destination_host_died = true
			:: else
			fi
		}
		/* died() */
		if
		:: destination_dies == ENGINE && told && destination_verdict == UNDER_WAY ->
			destination_verdict = UNKNOWN
		:: destination_dies == ENGINE && !told ->
			atomic { destination_runs = false; destination_verdict = FAILED }
		:: else
		fi
	}
	d_step {
		destination_over = true;
		err = NOTHING; needs = 0;
		peer_aborted = false; aborted = false; told = false; blackout = false
	}
}

/* ---- What goes wrong ---- */

active proctype world()
{
	do
	:: atomic { !dark && !BOTH_OVER -> fault = true; dark = true }
	:: atomic { !source_reset && !BOTH_OVER -> fault = true; source_reset = true; destination_reset = true }
	:: atomic { source_dies == NOBODY && !source_over -> fault = true; source_dies = ENGINE }
	:: atomic { source_dies == NOBODY && !source_over -> fault = true; source_dies = HOST }
	:: atomic { destination_dies == NOBODY && !destination_over -> fault = true; destination_dies = ENGINE }
	:: atomic { destination_dies == NOBODY && !destination_over -> fault = true; destination_dies = HOST }
	:: calm = true; break
	od
}

/* ---- What must hold at every instant ---- */

/* Never true: only their names count, by which pan tells what was violated. */
hidden byte one_guest, runs_on_commit;
hidden byte source_completed, source_failed, source_unknown;
hidden byte destination_completed, destination_failed, destination_unknown;
hidden byte ends_well, moves, doubts, turns_back;

active proctype judge()
{
	do
	:: atomic { source_runs && destination_runs -> assert(one_guest) }
	:: atomic { ran_there && !handed_over -> assert(runs_on_commit) }

	/* The verdicts are true. */
	:: atomic { source_verdict == COMPLETED && !ran_there -> assert(source_completed) }
	:: atomic { source_verdict == FAILED && (ran_there || !source_runs && !source_host_died) ->
		assert(source_failed) }
	:: atomic { source_verdict == UNKNOWN && !source_front && (source_runs || !handed_over) ->
		assert(source_unknown) }
	/* The front of an engine that was killed knows less. */
	:: atomic { source_verdict == UNKNOWN && source_front && !asked -> assert(source_unknown) }
	:: atomic { destination_verdict == COMPLETED &&
		    (!ran_there || !destination_runs && !destination_host_died) ->
		assert(destination_completed) }
	:: atomic { destination_verdict == FAILED && ran_there -> assert(destination_failed) }
	:: atomic { destination_verdict == UNKNOWN && !commit_came -> assert(destination_unknown) }

	/* Nobody died, nothing was lost, nobody was stopped: it runs at one side, and both know. */
	:: atomic { BOTH_OVER && !fault &&
		    !(source_runs != destination_runs && destination_verdict == source_verdict &&
		      source_verdict == (destination_runs -> COMPLETED : FAILED)) ->
		assert(ends_well) }

	/* Not that it must not, but that it can: what never happens holds of itself. */
#ifdef MOVES
	:: atomic { !fault && source_verdict == COMPLETED && destination_runs -> assert(moves) }
#endif
#ifdef DOUBTS
	:: atomic { source_verdict == UNKNOWN && !source_front && destination_runs -> assert(doubts) }
#endif
#ifdef TURNS_BACK
	:: atomic { !fault && handed_over && source_runs -> assert(turns_back) }
#endif
	:: BOTH_OVER -> break
	od
}

ltl both_end { <> BOTH_OVER }
