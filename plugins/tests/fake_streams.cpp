// Streams, events, captures and graphs. A stream is lazy: what is in it is done when somebody waits
// for it, and not before, so that whoever does not wait where he must reads what is not there yet.
#include "fake_state.h"

#include <chrono>
#include <cstdlib>
#include <deque>
#include <map>
#include <thread>
#include <utility>

namespace {

struct Capture {
    std::thread::id thread;
    CUstreamCaptureMode mode;
    std::vector<fake::Work> work;
    bool isBroken;
};

}  // namespace

struct CUstream_st {
    CUctx_st* context;
    bool isBlocking;  // waits for the legacy stream, and that for it
    bool isLegacy;
    std::deque<fake::Work> queue;
    CUresult error;  // of work that was done; the next who waits is told
    std::unique_ptr<Capture> capture;
};

struct CUevent_st {
    bool hasTiming;
    std::shared_ptr<CUstream_st> stream;  // null: never recorded
    uint64_t order;
    bool isCaptured;
    std::chrono::steady_clock::time_point time;
};

struct CUgraph_st {
    std::vector<fake::Work> work;
};

struct CUgraphExec_st {
    std::vector<fake::Work> work;
};

namespace {

using Stream = std::shared_ptr<CUstream_st>;

std::map<CUstream, Stream> gStreams;
std::map<std::pair<CUctx_st*, uintptr_t>, Stream> gDefaultStreams;
std::map<CUevent, std::shared_ptr<CUevent_st>> gEvents;
std::map<CUgraph, std::unique_ptr<CUgraph_st>> gGraphs;
std::map<CUgraphExec, std::unique_ptr<CUgraphExec_st>> gExecutables;
uint64_t gOrder = 0;
bool gRefusesCaptures =
    std::getenv("FAKE_CUDA_REFUSES_CAPTURES") != nullptr;  // NOLINT(concurrency-mt-unsafe)

thread_local CUstreamCaptureMode gCaptureMode = CU_STREAM_CAPTURE_MODE_GLOBAL;
thread_local bool gIsCapturing = false;  // as a test says

constexpr uintptr_t kLEGACY = 1;
constexpr uintptr_t kPER_THREAD = 2;

Stream newStream(bool isBlocking, bool isLegacy) {
    return std::make_shared<CUstream_st>(
        CUstream_st{fake::current(), isBlocking, isLegacy, {}, CUDA_SUCCESS, nullptr});
}

// A stream by its handle, or null. The default ones are made when they are first named.
Stream find(CUstream handle) {
    auto const number = reinterpret_cast<uintptr_t>(handle);
    if (number <= kPER_THREAD) {
        bool const isLegacy = number != kPER_THREAD;
        Stream& stream = gDefaultStreams[{fake::current(), isLegacy ? kLEGACY : kPER_THREAD}];
        stream = stream ? stream : newStream(true, isLegacy);
        return stream;
    }
    auto const found = gStreams.find(handle);
    return found == gStreams.end() ? nullptr : found->second;
}

std::vector<Stream> allStreams() {
    std::vector<Stream> result;
    for (auto const& [handle, stream] : gStreams) {
        result.push_back(stream);
    }
    for (auto const& [key, stream] : gDefaultStreams) {
        result.push_back(stream);
    }
    return result;
}

// Does a stream's work up to one in the order of all, and before each what it has to wait for.
void runUntil(CUstream_st& stream, uint64_t order) {
    while (!stream.queue.empty() && stream.queue.front().order <= order) {
        uint64_t const before = stream.queue.front().order - 1;
        for (Stream const& other : allStreams()) {
            bool const isWaitedFor = other->context == stream.context && other->isBlocking &&
                                     stream.isBlocking && other->isLegacy != stream.isLegacy;
            if (isWaitedFor) {
                runUntil(*other, before);
            }
        }
        fake::Work const work = std::move(stream.queue.front());
        stream.queue.pop_front();
        if (CUresult const result = work.run(); result != CUDA_SUCCESS) {
            stream.error = result;
            stream.queue.clear();
        }
    }
}

CUresult waitFor(CUstream_st& stream, uint64_t order) {
    runUntil(stream, order);
    return std::exchange(stream.error, CUDA_SUCCESS);
}

// Legacy-stream work breaks the capture of every stream that would wait for it.
bool breaksCaptures(CUstream_st const& stream) {
    bool isBreaking = false;
    for (Stream const& other : allStreams()) {
        if (stream.isLegacy && other->capture && other->isBlocking &&
            other->context == stream.context) {
            other->capture->isBroken = true;
            isBreaking = true;
        }
    }
    return isBreaking;
}

CUresult breakCapture(Capture& capture, CUresult result) {
    capture.isBroken = true;
    return result;
}

// Like enqueue, and says where in the order of all the work stands.
std::pair<CUresult, uint64_t> put(CUstream_st& stream, std::function<CUresult()> run,
                                  std::vector<fake::Range> ranges) {
    if (breaksCaptures(stream)) {
        return {CUDA_ERROR_STREAM_CAPTURE_IMPLICIT, 0};
    }
    stream.queue.push_back({std::move(run), std::move(ranges), ++gOrder});
    return {CUDA_SUCCESS, gOrder};
}

}  // namespace

namespace fake {

CUresult enqueue(CUstream handle, std::function<CUresult()> run, std::vector<Range> ranges) {
    Stream const stream = find(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!stream->capture) {
        return put(*stream, std::move(run), std::move(ranges)).first;
    }
    if (stream->capture->isBroken) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    if (gRefusesCaptures) {
        return breakCapture(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    stream->capture->work.push_back({std::move(run), std::move(ranges), 0});
    return CUDA_SUCCESS;
}

bool forbiddenByCapture() {
    if (gCaptureMode == CU_STREAM_CAPTURE_MODE_RELAXED) {
        return false;
    }
    bool isForbidden = gIsCapturing;
    for (Stream const& stream : allStreams()) {
        Capture* const capture = stream->capture.get();
        if (capture == nullptr || capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED) {
            continue;
        }
        bool const isOurs = capture->thread == std::this_thread::get_id();
        bool const isGlobal = capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL &&
                              gCaptureMode == CU_STREAM_CAPTURE_MODE_GLOBAL;
        if (isOurs || isGlobal) {
            capture->isBroken = true;
            isForbidden = true;
        }
    }
    return isForbidden;
}

bool isInUse(Range const& range) {
    for (Stream const& stream : allStreams()) {
        for (Work const& work : stream->queue) {
            for (Range const& used : work.ranges) {
                if (used.address < range.address + range.size &&
                    range.address < used.address + used.size) {
                    return true;
                }
            }
        }
    }
    return false;
}

void countStreams(Held& held) {
    held.streams = gStreams.size();
    held.events = gEvents.size();
    held.graphs = gGraphs.size();
    held.executables = gExecutables.size();
}

void setCapturing(bool capturing) {
    gIsCapturing = capturing;
}

CUstreamCaptureMode captureMode() {
    return gCaptureMode;
}

}  // namespace fake

// cuda.h of CUDA 13 calls the second version by this name; drivers have both.
#undef cuEventElapsedTime

extern "C" {

CUresult cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode* mode) {
    FAKE_CALL("cuThreadExchangeStreamCaptureMode")
    std::swap(*mode, gCaptureMode);
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream* handle, unsigned int flags) {
    FAKE_CALL_IN_CONTEXT("cuStreamCreate")
    Stream const stream = newStream((flags & CU_STREAM_NON_BLOCKING) == 0, false);
    *handle = stream.get();
    gStreams[*handle] = stream;
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream handle) {
    FAKE_FREE("cuStreamDestroy")
    auto const found = gStreams.find(handle);
    if (found == gStreams.end()) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (!found->second->queue.empty()) {
        fake::broken("a stream was destroyed with work in it", CUDA_SUCCESS);
        runUntil(*found->second, gOrder);
    }
    gStreams.erase(found);
    return fault;
}

CUresult cuStreamSynchronize(CUstream handle) {
    FAKE_CALL_IN_CONTEXT("cuStreamSynchronize")
    Stream const stream = find(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->capture) {
        return breakCapture(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    }
    if (breaksCaptures(*stream)) {
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    if (stream->isLegacy) {
        // It stands behind all blocking streams, even with nothing in it.
        stream->queue.push_back({[] { return CUDA_SUCCESS; }, {}, ++gOrder});
    }
    return waitFor(*stream, gOrder);
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent eventHandle, unsigned int) {
    FAKE_CALL_IN_CONTEXT("cuStreamWaitEvent")
    Stream const stream = find(handle);
    if (!stream || gEvents.count(eventHandle) == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    CUevent_st const& event = *gEvents[eventHandle];
    if (event.isCaptured != (stream->capture != nullptr)) {
        // Into a capture come only events of the same; out of it they do not come.
        return stream->capture && event.stream
                   ? breakCapture(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
                   : (event.isCaptured ? CUDA_ERROR_CAPTURED_EVENT : CUDA_SUCCESS);
    }
    if (!event.stream || stream->capture) {
        return CUDA_SUCCESS;
    }
    // As it is now: recording it anew does not change what this waits for.
    return put(*stream,
               [other = event.stream, order = event.order] {
                   runUntil(*other, order);
                   return CUDA_SUCCESS;
               },
               {})
        .first;
}

CUresult cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
    FAKE_CALL_IN_CONTEXT("cuStreamBeginCapture")
    Stream const stream = find(handle);
    if (!stream) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->isLegacy || stream->capture) {
        return stream->isLegacy ? CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED : CUDA_ERROR_ILLEGAL_STATE;
    }
    stream->capture =
        std::make_unique<Capture>(Capture{std::this_thread::get_id(), mode, {}, false});
    return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph* graph) {
    FAKE_FREE("cuStreamEndCapture")
    Stream const stream = find(handle);
    *graph = nullptr;
    if (!stream || !stream->capture) {
        return stream ? CUDA_ERROR_ILLEGAL_STATE : CUDA_ERROR_INVALID_HANDLE;
    }
    if (stream->capture->thread != std::this_thread::get_id()) {
        return breakCapture(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
    }
    std::unique_ptr<Capture> const capture = std::move(stream->capture);
    if (fault != CUDA_SUCCESS) {
        return fault;
    }
    if (capture->isBroken) {
        return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    }
    auto made = std::make_unique<CUgraph_st>(CUgraph_st{std::move(capture->work)});
    *graph = made.get();
    gGraphs[*graph] = std::move(made);
    return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent* handle, unsigned int flags) {
    FAKE_CALL_IN_CONTEXT("cuEventCreate")
    auto const event = std::make_shared<CUevent_st>(
        CUevent_st{(flags & CU_EVENT_DISABLE_TIMING) == 0, nullptr, 0, false, {}});
    *handle = event.get();
    gEvents[*handle] = event;
    return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent handle) {
    FAKE_FREE("cuEventDestroy")
    return gEvents.erase(handle) == 1 ? fault : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream streamHandle) {
    FAKE_CALL_IN_CONTEXT("cuEventRecord")
    Stream const stream = find(streamHandle);
    if (!stream || gEvents.count(handle) == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    std::shared_ptr<CUevent_st> const event = gEvents[handle];
    event->isCaptured = stream->capture != nullptr;
    event->stream = stream;
    if (stream->capture) {
        return CUDA_SUCCESS;
    }
    auto const [result, order] = put(*stream,
                                     [event] {
                                         event->time = std::chrono::steady_clock::now();
                                         return CUDA_SUCCESS;
                                     },
                                     {});
    event->order = order;
    return result;
}

CUresult cuEventSynchronize(CUevent handle) {
    FAKE_CALL_IN_CONTEXT("cuEventSynchronize")
    if (gEvents.count(handle) == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    CUevent_st const& event = *gEvents[handle];
    if (event.isCaptured) {
        return CUDA_ERROR_CAPTURED_EVENT;
    }
    return event.stream ? waitFor(*event.stream, event.order) : CUDA_SUCCESS;
}

CUresult cuEventElapsedTime(float* milliseconds, CUevent first, CUevent last) {
    FAKE_CALL_IN_CONTEXT("cuEventElapsedTime")
    for (CUevent const handle : {first, last}) {
        if (gEvents.count(handle) == 0 || !handle->hasTiming || !handle->stream) {
            return CUDA_ERROR_INVALID_HANDLE;
        }
        if (!handle->stream->queue.empty() &&
            handle->stream->queue.front().order <= handle->order) {
            return CUDA_ERROR_NOT_READY;
        }
    }
    *milliseconds = std::chrono::duration<float, std::milli>(last->time - first->time).count();
    return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec* executable, CUgraph graph, unsigned long long) {
    FAKE_CALL_IN_CONTEXT("cuGraphInstantiateWithFlags")
    if (gGraphs.count(graph) == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    auto made = std::make_unique<CUgraphExec_st>(CUgraphExec_st{graph->work});
    *executable = made.get();
    gExecutables[*executable] = std::move(made);
    return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
    FAKE_FREE("cuGraphDestroy")
    return gGraphs.erase(graph) == 1 ? fault : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    FAKE_CALL_IN_CONTEXT("cuGraphLaunch")
    if (gExecutables.count(executable) == 0) {
        return CUDA_ERROR_INVALID_HANDLE;
    }
    for (fake::Work const& work : executable->work) {
        if (CUresult const result = fake::enqueue(stream, work.run, work.ranges);
            result != CUDA_SUCCESS) {
            return result;
        }
    }
    return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
    FAKE_FREE("cuGraphExecDestroy")
    return gExecutables.erase(executable) == 1 ? fault : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuLaunchHostFunc(CUstream stream, CUhostFn function, void* data) {
    FAKE_CALL_IN_CONTEXT("cuLaunchHostFunc")
    return fake::enqueue(stream,
                         [=] {
                             function(data);
                             return CUDA_SUCCESS;
                         },
                         {});
}

// For tests in Python, by ctypes.

// As cuLaunchHostFunc, of work that may fail and that uses memory: what an engine does.
CUresult fakeLaunchWork(CUstream stream, int (*function)(void*), void* data,
                        fake::Range const* ranges, size_t nbRanges) {
    FAKE_CALL_IN_CONTEXT("fakeLaunchWork")
    return fake::enqueue(
        stream, [=] { return function(data) == 0 ? CUDA_SUCCESS : CUDA_ERROR_LAUNCH_FAILED; },
        {ranges, ranges + nbRanges});
}

int fakeIsCapturing(CUstream handle) {
    std::lock_guard<std::recursive_mutex> const lock{fake::mutex()};
    Stream const stream = find(handle);
    return stream && stream->capture ? 1 : 0;
}

void fakeRefuseCaptures(int refuses) {
    gRefusesCaptures = refuses != 0;
}

}  // extern "C"
