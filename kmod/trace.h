/* SPDX-License-Identifier: GPL-2.0 */
#undef TRACE_SYSTEM
#define TRACE_SYSTEM lmtrack

#if !defined(LMTRACK_TRACE_H) || defined(TRACE_HEADER_MULTI_READ)
#define LMTRACK_TRACE_H

#include <linux/tracepoint.h>

TRACE_EVENT(lmtrack_fault,
	TP_PROTO(u64 region, u64 page),
	TP_ARGS(region, page),
	TP_STRUCT__entry(
		__field(u64, region)
		__field(u64, page)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->page = page;
	),
	TP_printk("region=%llu page=%llu", __entry->region, __entry->page)
);

TRACE_EVENT(lmtrack_stun,
	TP_PROTO(u64 region, u64 requested, u64 slept),
	TP_ARGS(region, requested, slept),
	TP_STRUCT__entry(
		__field(u64, region)
		__field(u64, requested)
		__field(u64, slept)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->requested = requested;
		__entry->slept = slept;
	),
	TP_printk("region=%llu requested=%lluns slept=%lluns", __entry->region,
		  __entry->requested, __entry->slept)
);

TRACE_EVENT(lmtrack_harvest,
	TP_PROTO(u64 region, unsigned long chunk, unsigned int pages, unsigned int pinned),
	TP_ARGS(region, chunk, pages, pinned),
	TP_STRUCT__entry(
		__field(u64, region)
		__field(unsigned long, chunk)
		__field(unsigned int, pages)
		__field(unsigned int, pinned)
	),
	TP_fast_assign(
		__entry->region = region;
		__entry->chunk = chunk;
		__entry->pages = pages;
		__entry->pinned = pinned;
	),
	TP_printk("region=%llu chunk=%lu pages=%u pinned=%u",
		  __entry->region, __entry->chunk, __entry->pages, __entry->pinned)
);

TRACE_EVENT(lmtrack_chunk_sent,
	TP_PROTO(u64 stream, u32 channel, u32 round, u32 region, unsigned long chunk,
		 unsigned int data, unsigned int zero),
	TP_ARGS(stream, channel, round, region, chunk, data, zero),
	TP_STRUCT__entry(
		__field(u64, stream)
		__field(u32, channel)
		__field(u32, round)
		__field(u32, region)
		__field(unsigned long, chunk)
		__field(unsigned int, data)
		__field(unsigned int, zero)
	),
	TP_fast_assign(
		__entry->stream = stream;
		__entry->channel = channel;
		__entry->round = round;
		__entry->region = region;
		__entry->chunk = chunk;
		__entry->data = data;
		__entry->zero = zero;
	),
	TP_printk("stream=%#llx channel=%u round=%u region=%u chunk=%lu data=%u zero=%u",
		  __entry->stream, __entry->channel, __entry->round, __entry->region,
		  __entry->chunk, __entry->data, __entry->zero)
);

TRACE_EVENT(lmtrack_round_begin,
	TP_PROTO(u64 stream, u32 round, u32 what),
	TP_ARGS(stream, round, what),
	TP_STRUCT__entry(
		__field(u64, stream)
		__field(u32, round)
		__field(u32, what)
	),
	TP_fast_assign(
		__entry->stream = stream;
		__entry->round = round;
		__entry->what = what;
	),
	TP_printk("stream=%#llx round=%u what=%u", __entry->stream, __entry->round,
		  __entry->what)
);

TRACE_EVENT(lmtrack_round_end,
	TP_PROTO(u64 stream, u32 round, u64 pages, u64 bytes, int error),
	TP_ARGS(stream, round, pages, bytes, error),
	TP_STRUCT__entry(
		__field(u64, stream)
		__field(u32, round)
		__field(u64, pages)
		__field(u64, bytes)
		__field(int, error)
	),
	TP_fast_assign(
		__entry->stream = stream;
		__entry->round = round;
		__entry->pages = pages;
		__entry->bytes = bytes;
		__entry->error = error;
	),
	TP_printk("stream=%#llx round=%u pages=%llu bytes=%llu error=%d", __entry->stream,
		  __entry->round, __entry->pages, __entry->bytes, __entry->error)
);

#endif /* LMTRACK_TRACE_H */

#undef TRACE_INCLUDE_PATH
#define TRACE_INCLUDE_PATH .
#undef TRACE_INCLUDE_FILE
#define TRACE_INCLUDE_FILE trace
#include <trace/define_trace.h>
