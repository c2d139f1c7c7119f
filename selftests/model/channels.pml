/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Rounds over several channels: a stale copy of a page never lands after a newer one, and in
 * the end the destination has what the source had.
 *
 * This is what kmod/stream.c, lib/sender.c, lib/source.c, lib/channels.c, lib/receiver.c and
 * lib/destination.c do: a round sends a chunk over one channel, whichever comes for it first; it
 * begins when the one before was acknowledged, and is acknowledged when the ROUND_END of every
 * channel in it was stored. When a channel is lost, it goes on over those that are left:
 *
 * 1. The barrier: before anything that a lost channel carried goes out over another, the
 *    destination has closed that channel, so that nothing of it can be stored any more, and has
 *    said so. (Of a socket, the thread was joined; a queue pair is in the error state.)
 * 2. What the channel carried since the last acknowledgement is dirty again, for the next round.
 * 3. The round then needs the ROUND_END of those that are left.
 * 4. A channel joins again between two rounds.
 *
 * When none is left, the build waits for one to return; here it is over. With NO_FAILOVER any loss
 * ends it.
 *
 * A chunk is one page, which holds the number of its last write. Frames wait on a channel for as
 * long as they like; those on a lost one may still arrive, in order, as far as they do. The
 * header of a frame is looked at before its payload has come. That a harvest and a write do not
 * miss each other is assumed here; selftests/uapi_race is about that.
 *
 * The macros that are not defined here break a rule each, or ask whether something can happen:
 * see ./check.
 */

#ifndef WRITES
#define WRITES		2	/* of the guest, after the first */
#endif
#ifndef LOSSES
#define LOSSES		1	/* of channels, in all */
#endif
#define CHUNKS		2
#define CHANNELS	2
#define ROUNDS		2	/* before the pause, at most */
#define ROUND_END	CHUNKS	/* in place of a chunk */
#define OTHER(n)	(1 - (n))

/* ---- The source ---- */

byte page[CHUNKS] = 1;
bool dirty[CHUNKS] = true;
bool paused;
byte taken[CHUNKS];		/* the last round in which a channel came for it */
byte carrier[CHUNKS];		/* since the last acknowledgement: which carried it, plus 1 */
byte round;
byte sent[CHANNELS];		/* rounds, up to ROUND_END */
bool failed[CHANNELS];		/* its thread has failed to send, and waits to be told */
bool stop[CHANNELS], stopped[CHANNELS];

/* ---- Between them ---- */

/* May the channel come for the chunk? */
#ifdef OWN_CHANNEL
#define FREE(chunk)	((chunk) % CHANNELS == me)
#elif defined(TWICE)
#define FREE(chunk)	true
#else
#define FREE(chunk)	(taken[chunk] != round)
#endif

chan wire[CHANNELS] = [CHUNKS + 1] of { byte, byte, byte };	/* chunk, contents, round */
bool lost[CHANNELS];
byte losses;
byte acked;			/* ROUND_ACK */
byte fence;			/* the channel that the destination is to close, plus 1; 0: it is closed */
bool prepare;			/* PREPARE */
bool over;

/* ---- The destination ---- */

byte copy[CHUNKS];
byte ended[CHANNELS];		/* rounds */
bool busy[CHANNELS];		/* its thread has a frame whose payload is on its way */
bool closed[CHANNELS];		/* its thread takes no other */
bool gone[CHANNELS];		/* its ROUND_END is not waited for */

/* Never true: only their names count, by which pan tells what was violated. */
hidden byte no_stale_copy, all_there, round_in_place, moves, goes_on;

/* The write sets the bit, the harvest clears it; the page is read when the frame leaves. */
active proctype guest()
{
	byte writes;

	do
	:: atomic { writes < WRITES && !paused -> writes++; page[0]++; dirty[0] = true }
	:: atomic { writes < WRITES && !paused -> writes++; page[1]++; dirty[1] = true }
	:: break
	od;
	writes = 0
}

proctype sender(byte me)
{
	byte chunk;

end:	do
	:: sent[me] != round && !stop[me] && !failed[me] && !over ->
		do
		:: atomic { chunk < CHUNKS && FREE(chunk) && dirty[chunk] ->
			dirty[chunk] = false;
			taken[chunk] = round;
#ifndef NO_FAILOVER
			carrier[chunk] = me + 1
#endif
		   }
			if
			:: atomic { wire[me]!chunk, page[chunk], round; chunk++ }
			:: lost[me] -> failed[me] = true; break
			:: over -> break		/* it was shut down */
			fi
		:: atomic { chunk < CHUNKS && !(FREE(chunk) && dirty[chunk]) -> chunk++ }
		:: atomic { chunk == CHUNKS && nfull(wire[me]) ->
			wire[me]!ROUND_END, 0, round;
			sent[me] = round;
			break
		   }
		:: lost[me] -> failed[me] = true; break
		:: over -> break
		od;
		chunk = 0
	:: atomic { stop[me] && !stopped[me] -> stopped[me] = true }
	od
}

proctype receiver(byte me)
{
	byte chunk, contents, number;

end:	do
	:: atomic { !closed[me] && !over && nempty(wire[me]) -> wire[me]?chunk, contents, number;
		/* check_place() */
		if
		:: number == acked + 1 && ended[me] != number -> busy[me] = true
#ifdef ROUNDS_OVERLAP
		:: else -> busy[me] = true
#elif defined(NO_BARRIER)
		:: else -> closed[me] = true; goto refused
#elif defined(ACKS_EARLY)
		:: else -> over = true; goto refused
#else
		:: else -> assert(round_in_place)
#endif
		fi
	   }
		atomic {
			if
			:: chunk == ROUND_END -> ended[me] = number
			:: chunk != ROUND_END && contents >= copy[chunk] -> copy[chunk] = contents
			:: else -> assert(no_stale_copy)
			fi;
			busy[me] = false;
refused:		chunk = 0; contents = 0; number = 0
		}
	od
}

#define STORED(n)	(closed[n] || gone[n] || ended[n] > acked)

active proctype destination()
{
end:	do
#ifdef ACKS_EARLY
	:: atomic { !over && acked < round && (ended[0] > acked || ended[1] > acked) -> acked++ }
#else
	:: atomic { !over && acked < round && STORED(0) && STORED(1) -> acked++ }
#endif
	:: fence != 0 ->
#ifdef NO_BARRIER
		atomic { gone[fence - 1] = true; fence = 0 }
#else
		closed[fence - 1] = true;
#ifndef DOES_NOT_JOIN
		!busy[fence - 1];	/* kmig_receiver_close() joins the thread */
#endif
		fence = 0
#endif
	:: prepare && !over ->
		atomic { closed[0] = true; closed[1] = true }
		atomic {
			!busy[0] && !busy[1];
			if
			:: copy[0] == page[0] && copy[1] == page[1] -> over = true
			:: else -> assert(all_there)
			fi;
			/* Not that it must not come to this, but that it can. */
#ifdef MOVES
			assert(moves);
#endif
#ifdef GOES_ON
			if
			:: losses -> assert(goes_on)
			:: else
			fi
#endif
		}
	od
}

inline begin_round()
{
	round++
}

inline fail_over(which)
{
	stop[which] = true;
	if
	:: stop[OTHER(which)] -> over = true; goto out
	:: else
	fi;
	stopped[which];
	fence = which + 1;
#ifndef NO_BARRIER
	fence == 0;
#endif
	atomic {
		for (n : 0 .. CHUNKS - 1) {
			if
			:: carrier[n] == which + 1 ->
				carrier[n] = 0;
#ifndef FORGETS
				dirty[n] = true
#endif
			:: else
			fi
		}
		n = 0
	}
}

/* A new connection in place of one that was lost and closed; rounds up to @since are not its own. */
inline join(which, since)
{
	do
	:: nempty(wire[which]) -> wire[which]?_, _, _
	:: empty(wire[which]) -> break
	od;
	lost[which] = false;
	failed[which] = false; stop[which] = false; stopped[which] = false; closed[which] = false;
	sent[which] = since;
	ended[which] = acked
}

active proctype source()
{
	byte n;

	atomic {
		run sender(0); run sender(1); run receiver(0); run receiver(1)
	}
	do
	:: begin_round();
		do
#ifdef ROUNDS_OVERLAP
		:: acked == round || !paused && sent[0] == round && sent[1] == round -> break
#else
		:: acked == round -> break
#endif
#ifndef NO_FAILOVER
		:: lost[0] && !stop[0] -> fail_over(0)
		:: lost[1] && !stop[1] -> fail_over(1)
#else
		:: lost[0] || lost[1] -> over = true; goto out
#endif
#ifdef JOINS_AT_ONCE
		:: atomic { stopped[0] && acked != round -> join(0, round - 1) }
#endif
		od;
#ifndef NO_FAILOVER
		atomic {
			for (n : 0 .. CHUNKS - 1) {
				carrier[n] = 0
			}
			n = 0
		}
#endif
#ifdef JOINS
		if
		:: atomic { stopped[0] -> join(0, round) }
		:: atomic { stopped[1] -> join(1, round) }
		:: true
		fi;
#endif
		if
		:: !paused && round < ROUNDS
		:: !paused -> paused = true
		:: paused && (dirty[0] || dirty[1])
		:: paused && !dirty[0] && !dirty[1] -> break
		fi
	od;
	prepare = true;
out:
	over
}

active proctype world()
{
	do
	:: atomic { losses < LOSSES && !lost[0] && !over -> losses++; lost[0] = true }
	:: atomic { losses < LOSSES && !lost[1] && !over -> losses++; lost[1] = true }
	:: break
	od
}
