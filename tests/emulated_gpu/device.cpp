// A GPU that exists in this process only: device "cuda", whose kernels are torch's own for the CPU.
//
// A stream is a queue with a thread. An operator's call finds the result's shape (by its "meta" kernel), takes memory
// for it, and queues the work: what reads it too early reads garbage. Built by `device.py`, whose docstring says more.
#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/Resize.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>

#include <sys/mman.h>

using at::IValue, at::Tensor, c10::DispatchKey, torch::jit::Stack;
using Work = std::function<void()>;

const c10::Device GPU(c10::kCUDA, 0);
constexpr uint64_t MOST_QUEUED = 1024; // as much as a driver queues before it makes the caller wait

// ---- streams ----

struct Queue {
  std::deque<Work> work;
  uint64_t issued = 0, done = 0;
  uint64_t allowed = 0; // lazy: nothing is done before somebody waits for it
};

struct Mark { // a place in a queue
  Queue* queue = nullptr;
  uint64_t place = 0;
  double at_ms = 0;
  bool passed() const { return !queue || queue->done >= place; }
};

// Never destroyed: threads wait for it until the process ends.
auto& guard = *new std::mutex;
auto& changed = *new std::condition_variable;
auto& queues = *new std::vector<Queue*>;
auto& failure = *new std::string; // of a kernel: reported by whoever waits next, as CUDA does
bool lazy = false;
int seldom = 50; // not lazy: one in so many pieces of work is late, by up to a millisecond
thread_local int64_t current = 0;
thread_local std::vector<Work>* capturing = nullptr; // a graph's work
std::atomic<int> captures = 0; // of all threads
thread_local int capture_mode = 0; // 0: while anybody captures a graph, this thread may not wait; 2: it may

struct WithoutGil { // while the caller waits
  PyThreadState* state = PyGILState_Check() ? PyEval_SaveThread() : nullptr;
  ~WithoutGil() { if (state) PyEval_RestoreThread(state); }
};

void serve(Queue* queue, unsigned seed) {
  c10::InferenceMode inference;
  std::minstd_rand random(seed);
  for (;;) {
    Work work;
    {
      std::unique_lock lock(guard);
      changed.wait(lock, [&] { return queue->done < (lazy ? std::min(queue->allowed, queue->issued) : queue->issued); });
      work = std::move(queue->work.front());
      queue->work.pop_front();
    }
    if (!lazy && random() % seldom == 0)
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 1000));
    try {
      work();
    } catch (const std::exception& error) {
      std::cerr << "emulated GPU: " << error.what() << std::endl;
      std::lock_guard lock(guard);
      failure = error.what();
    }
    work = nullptr;
    std::lock_guard lock(guard);
    queue->done++;
    changed.notify_all();
  }
}

int64_t new_queue() {
  std::lock_guard lock(guard);
  queues.push_back(new Queue);
  std::thread(serve, queues.back(), unsigned(queues.size())).detach();
  return int64_t(queues.size()) - 1;
}

Mark enqueue_locked(int64_t stream, Work work) {
  auto* queue = queues[stream];
  queue->work.push_back(std::move(work));
  queue->allowed = std::max(queue->allowed, ++queue->issued - std::min(queue->issued, MOST_QUEUED));
  changed.notify_all();
  return {queue, queue->issued};
}

void enqueue(Work work) {
  if (capturing) {
    capturing->push_back(std::move(work));
    return;
  }
  std::lock_guard lock(guard);
  enqueue_locked(current, std::move(work));
}

void wait_for(const Mark& mark, bool by_host = true) {
  TORCH_CHECK(!(by_host && (capturing || (captures && capture_mode == 0))), "operation not permitted when stream is capturing");
  WithoutGil free;
  std::unique_lock lock(guard);
  if (mark.queue) mark.queue->allowed = std::max(mark.queue->allowed, mark.place);
  changed.notify_all();
  changed.wait(lock, [&] { return mark.passed(); });
  TORCH_CHECK(!by_host || failure.empty(), "emulated GPU: ", failure);
}

Mark end_of(int64_t stream) {
  std::lock_guard lock(guard);
  return {queues[stream], queues[stream]->issued};
}

void synchronize(int64_t stream) { wait_for(end_of(stream)); }

void synchronize_all() {
  for (size_t stream = 0; stream < queues.size(); stream++) synchronize(int64_t(stream));
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  using Recorded = std::shared_ptr<Mark>;
  static Recorded& at(void* event) { return *static_cast<Recorded*>(event); }
  static c10::Stream stream(int64_t id) { return c10::Stream(c10::Stream::UNSAFE, GPU, id); }

  c10::DeviceType type() const override { return c10::kCUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return GPU; }
  c10::Device getDevice() const override { return GPU; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return stream(current); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(0); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(new_queue()); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(new_queue()); }
  c10::Stream exchangeStream(c10::Stream next) const override { return stream(std::exchange(current, next.id())); }
  void* getStreamNativeHandle(const c10::Stream next) const override { return reinterpret_cast<void*>(next.id()); }
  bool queryStream(const c10::Stream& one) const override { return ask(end_of(one.id())); }
  void synchronizeStream(const c10::Stream& one) const override { synchronize(one.id()); }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize_all(); }
  bool isStreamCapturing(const c10::Stream&) const override { return capturing; }

  void record(void** event, const c10::Stream& one, c10::DeviceIndex, c10::EventFlag) const override {
    if (!*event) *event = new Recorded;
    auto recorded = at(*event) = std::make_shared<Mark>();
    if (capturing) return;
    std::lock_guard lock(guard);
    auto mark = enqueue_locked(one.id(), [recorded] {
      auto now = std::chrono::steady_clock::now().time_since_epoch();
      recorded->at_ms = std::chrono::duration<double, std::milli>(now).count();
    });
    recorded->queue = mark.queue, recorded->place = mark.place;
  }
  void block(void* event, const c10::Stream& one) const override {
    if (capturing || !event) return; // one thread's captured work is in order
    std::lock_guard lock(guard);
    enqueue_locked(one.id(), [mark = at(event)] { wait_for(*mark, false); });
  }
  static bool ask(const Mark& mark) { // who asks again and again waits, too
    std::lock_guard lock(guard);
    if (mark.queue) mark.queue->allowed = std::max(mark.queue->allowed, mark.place);
    changed.notify_all();
    return mark.passed();
  }
  bool queryEvent(void* event) const override { return ask(*at(event)); }
  void synchronizeEvent(void* event) const override { if (event) wait_for(*at(event)); }
  double elapsedTime(void* begin, void* end, c10::DeviceIndex) const override { return at(end)->at_ms - at(begin)->at_ms; }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override { delete static_cast<Recorded*>(event); }
};

// ---- memory ----

struct Block {
  size_t size;
  int64_t stream;
  bool of_graph;
  std::set<int64_t> users; // other streams, by `record_stream`
};

auto& blocks = *new std::map<char*, Block>;
auto& unused = *new std::map<std::pair<int64_t, size_t>, std::vector<char*>>;
auto& in_use = *new std::deque<std::pair<char*, std::vector<Mark>>>;
constexpr size_t MOST_SPOILT = 64 << 20;
constexpr size_t GAP = 16 << 20; // nothing is there: what is written beside a block ends the process

void give_back_locked(char* memory) {
  auto& block = blocks.at(memory);
  block.users.clear();
  unused[{block.stream, block.size}].push_back(memory);
}

void release(void* pointer) { // as torch's allocator: free at once for what is queued on the same stream
  auto* memory = static_cast<char*>(pointer);
  std::lock_guard lock(guard);
  auto& block = blocks.at(memory);
  if (block.of_graph) return;
  if (block.users.empty()) return give_back_locked(memory);
  std::vector<Mark> marks;
  for (auto stream : block.users) marks.push_back({queues[stream], queues[stream]->issued});
  in_use.emplace_back(memory, marks);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    size_t size = std::max<size_t>(1, (n + 511) / 512) * 512;
    std::lock_guard lock(guard);
    for (auto one = in_use.begin(); one != in_use.end();) {
      bool passed = std::all_of(one->second.begin(), one->second.end(), [](auto& mark) { return mark.passed(); });
      if (passed) give_back_locked(one->first);
      one = passed ? in_use.erase(one) : std::next(one);
    }
    char* memory;
    if (auto& some = unused[{current, size}]; !some.empty() && !capturing) {
      memory = some.back();
      some.pop_back();
      enqueue_locked(current, [=] { std::memset(memory, 0xFF, std::min(size, MOST_SPOILT)); });
    } else {
      size_t whole = (size + 4095) / 4096 * 4096;
      int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      char* place = static_cast<char*>(mmap(nullptr, whole + 2 * GAP, PROT_NONE, flags, -1, 0));
      TORCH_CHECK(place != MAP_FAILED, "no memory");
      mprotect(place + GAP, whole, PROT_READ | PROT_WRITE);
      memory = place + GAP + (whole - size);
      std::memset(memory, 0xFF, std::min(size, MOST_SPOILT));
      blocks[memory] = {size, current, capturing != nullptr, {}};
    }
    return {memory, memory, &release, GPU};
  }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not emulated"); }
};

auto& registered = *new std::map<const char*, size_t>; // host memory that the GPU reads: what torch has pinned, too

bool is_registered(const void* pointer, size_t n = 1) {
  std::lock_guard lock(guard);
  auto* memory = static_cast<const char*>(pointer);
  auto next = registered.upper_bound(memory);
  return next != registered.begin() && memory + n <= std::prev(next)->first + std::prev(next)->second;
}

bool is_ours(const void* pointer, size_t n) {
  std::lock_guard lock(guard);
  auto* memory = static_cast<char*>(const_cast<void*>(pointer));
  auto next = blocks.upper_bound(memory);
  return next != blocks.begin() && memory + n <= std::prev(next)->first + std::prev(next)->second.size;
}

int host_register(size_t address, size_t n) { // cudaError: invalid value, already registered
  auto* memory = reinterpret_cast<const char*>(address);
  if (!n || !memory) return 1;
  std::lock_guard lock(guard);
  auto next = registered.lower_bound(memory + n);
  if (next != registered.begin() && std::prev(next)->first + std::prev(next)->second > memory) return 712;
  registered[memory] = n;
  return 0;
}

int host_unregister(size_t address) { // cudaErrorHostMemoryNotRegistered
  std::lock_guard lock(guard);
  return registered.erase(reinterpret_cast<const char*>(address)) ? 0 : 713;
}

auto& of_torch = *new std::set<const void*>;

void unpin(void* memory) {
  host_unregister(reinterpret_cast<size_t>(memory));
  std::lock_guard lock(guard);
  of_torch.erase(memory);
  std::free(memory);
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t n) override {
    size_t size = std::max<size_t>(1, (n + 511) / 512) * 512;
    void* memory = std::aligned_alloc(512, size);
    std::memset(memory, 0xFF, size);
    host_register(reinterpret_cast<size_t>(memory), size);
    std::lock_guard lock(guard);
    of_torch.insert(memory);
    return {memory, memory, &unpin, c10::kCPU};
  }
  void copy_data(void*, const void*, size_t) const override { TORCH_CHECK(false, "not emulated"); }
};

auto& memory_of_gpu = *new Memory;
auto& pinned_memory = *new PinnedMemory;

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* memory) const override { return is_registered(memory); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  at::Device getDeviceFromPtr(void*) const override { return GPU; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  int getNumGPUs() const override { return 1; }
  void deviceSynchronize(c10::DeviceIndex) const override { synchronize_all(); }
};

// ---- operators ----

Tensor on_cpu(const Tensor& tensor) { // the same memory, which nothing keeps
  static char nothing;
  auto options = at::TensorOptions().dtype(tensor.dtype()).device(at::kCPU);
  auto* memory = tensor.numel() ? tensor.mutable_data_ptr() : &nothing;
  return at::from_blob(memory, tensor.sizes(), tensor.strides(), options);
}

Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<at::Device>, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  return at::detail::empty_generic(size, &memory_of_gpu, c10::DispatchKeySet(DispatchKey::CUDA),
                                   dtype.value_or(at::get_default_dtype_as_scalartype()), format);
}

Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(size, stride, &memory_of_gpu, c10::DispatchKeySet(DispatchKey::CUDA),
                                           dtype.value_or(at::get_default_dtype_as_scalartype()));
}

const Tensor& resize_(const Tensor& self, at::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  size_t needed = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  if (needed > self.storage().nbytes()) {
    self.storage().set_data_ptr(memory_of_gpu.allocate(needed)); // what was there is not kept: outputs are resized
    self.storage().set_nbytes(needed);
  }
  return self;
}

void record_stream(Tensor& self, c10::Stream stream) {
  std::lock_guard lock(guard);
  auto& block = blocks.at(static_cast<char*>(self.storage().mutable_data()));
  if (stream.id() != block.stream) block.users.insert(stream.id());
}

// A copy from or to pinned memory is queued if it may be. torch keeps what it has pinned itself until it is done.
Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.numel()) return self;
  const Tensor& host = self.is_cuda() ? source : self;
  auto from = source.is_cuda() ? on_cpu(source) : source, to = self.is_cuda() ? on_cpu(self) : self;
  if (!host.is_cuda()) {
    auto* memory = host.storage().data();
    non_blocking &= is_registered(memory) && host.is_contiguous();
    std::lock_guard lock(guard);
    if (non_blocking && !of_torch.count(memory)) (self.is_cuda() ? from : to) = on_cpu(host);
  }
  if (self.is_cuda() && !source.is_cuda() && !non_blocking) from = source.clone();
  enqueue([=]() mutable { to.copy_(from); });
  if (!host.is_cuda() && !non_blocking) synchronize(current);
  return self;
}

using Change = std::function<Tensor(const Tensor&)>;

IValue with(const IValue& value, const Change& change, c10::DeviceType device) { // each tensor in it changed
  auto of = [&](const Tensor& tensor) { return tensor.defined() ? change(tensor) : tensor; };
  if (value.isTensor()) return of(value.toTensor());
  if (value.isDevice() && value.toDevice().is_cuda()) return c10::Device(device);
  if (value.isTensorList()) {
    c10::List<Tensor> changed;
    for (Tensor tensor : value.toTensorVector()) changed.push_back(of(tensor));
    return changed;
  }
  if (value.isList() && value.toList().elementType()->isSubtypeOf(*c10::OptionalType::ofTensor())) {
    c10::List<std::optional<Tensor>> changed;
    for (const IValue& one : value.toListRef())
      changed.push_back(one.isNone() ? std::nullopt : std::optional<Tensor>(of(one.toTensor())));
    return changed;
  }
  return value;
}

Tensor on_meta(const Tensor& tensor) {
  return at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(at::kMeta));
}

void run_now(const c10::OperatorHandle& op, Stack* stack, size_t begin) {
  synchronize(current);
  std::vector<std::pair<Tensor, Tensor>> same;
  for (size_t i = begin; i < stack->size(); i++)
    (*stack)[i] = with((*stack)[i], [&](const Tensor& tensor) {
      same.emplace_back(tensor.is_cuda() ? on_cpu(tensor) : tensor, tensor);
      return same.back().first;
    }, c10::kCPU);
  Stack work(stack->begin() + long(begin), stack->end());
  {
    WithoutGil free;
    op.callBoxed(work);
  }
  stack->resize(begin);
  for (auto& value : work)
    stack->push_back(with(value, [&](const Tensor& tensor) {
      for (auto& [cpu, own] : same) if (cpu.is_same(tensor)) return own;
      auto made = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(GPU));
      synchronize(current); // its memory may have been used before, and is spoilt
      on_cpu(made).copy_(tensor);
      return made;
    }, c10::kCPU));
}

// For every operator of a GPU: queue its CPU kernel.
void run(const c10::OperatorHandle& op, c10::DispatchKeySet, Stack* stack) {
  const auto& name = op.schema().name();
  const size_t begin = stack->size() - op.schema().arguments().size();
  const bool indices_may_be_anywhere = name.find("index") != std::string::npos;
  std::vector<std::pair<Tensor, Tensor>> metas; // and whose they are
  Stack meta, work;
  for (size_t i = begin; i < stack->size(); i++)
    meta.push_back(with((*stack)[i], [&](const Tensor& tensor) {
      TORCH_CHECK(tensor.is_cuda() || !tensor.dim() || indices_may_be_anywhere, name, ": expected all tensors on the GPU");
      metas.emplace_back(tensor.dim() || tensor.is_cuda() ? on_meta(tensor) : tensor, tensor);
      return metas.back().first;
    }, c10::kMeta));
  try {
    op.callBoxed(meta);
  } catch (const std::exception&) { // the result's shape depends on what is in the tensors
    return run_now(op, stack, begin);
  }
  for (auto& value : meta)
    if (!value.isTensor() && !value.isTensorList() && !value.isNone()) return run_now(op, stack, begin);
  for (auto& [shape, own] : metas) if (shape.sizes() != own.sizes()) own.resize_(shape.sizes());
  for (size_t i = begin; i < stack->size(); i++)
    work.push_back(with((*stack)[i], [&](const Tensor& tensor) {
      if (tensor.is_cuda()) return on_cpu(tensor);
      auto value = tensor.clone();
      if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) value.unsafeGetTensorImpl()->set_wrapped_number(true);
      return value;
    }, c10::kCPU));
  stack->resize(begin);
  std::vector<std::optional<Tensor>> made; // by result; none where it is an argument
  for (auto& value : meta)
    stack->push_back(with(value, [&](const Tensor& shape) {
      for (auto& [one, own] : metas) {
        if (one.is_same(shape)) return made.push_back({}), own;
        if (one.storage().is_alias_of(shape.storage()))
          return made.push_back({}), own.as_strided(shape.sizes(), shape.strides(), own.storage_offset() + shape.storage_offset());
      }
      auto result = at::empty_strided(shape.sizes(), shape.strides(), shape.options().device(GPU));
      made.push_back(on_cpu(result));
      return result;
    }, c10::kCUDA));
  enqueue([op, work, made] {
    auto values = work;
    op.callBoxed(values);
    size_t place = 0;
    for (auto& value : values)
      with(value, [&](const Tensor& tensor) {
        if (auto& result = made[place++]) Tensor(*result).copy_(tensor);
        return tensor;
      }, c10::kCPU);
  });
}

// ---- graphs, and what others queue ----

struct Graph {
  std::vector<Work> work;
  void begin() { capturing = &work; captures++; }
  void end() { capturing = nullptr; captures--; }
  void replay() { for (auto& one : work) enqueue(one); }
};

void launch(pybind11::function function) { // a Triton kernel, say
  std::shared_ptr<pybind11::function> kept(new pybind11::function(std::move(function)), [](auto* one) {
    pybind11::gil_scoped_acquire gil;
    delete one;
  });
  enqueue([kept] {
    pybind11::gil_scoped_acquire gil;
    (*kept)();
  });
}

extern "C" {
// The driver's, as `copy_engine` calls them. This library is also named libcuda.so.1.
int cuMemcpyBatchAsync(void** targets, void** sources, size_t* sizes, size_t n, int*, size_t*, size_t, size_t* failed, void* stream) {
  if (!stream) return 1;
  static auto& told = std::cerr << "emulated copy engine: its first copies" << std::endl;
  std::vector<std::tuple<void*, void*, size_t>> copies;
  for (size_t i = n; i--;) { // in another order
    *failed = i;
    if (!is_registered(sources[i], sizes[i]) || !is_ours(targets[i], sizes[i])) return 1;
    copies.emplace_back(targets[i], sources[i], sizes[i]);
  }
  std::lock_guard lock(guard);
  enqueue_locked(reinterpret_cast<int64_t>(stream), [copies] {
    for (auto& [target, source, size] : copies) std::memcpy(target, source, size);
  });
  return 0;
}
int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t, int* status) {
  *found = version >= 12080 && std::string(name) == "cuMemcpyBatchAsync" ? (void*)cuMemcpyBatchAsync : nullptr;
  if (status) *status = *found ? 0 : 1;
  return 0;
}
int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 91;
  return device ? 101 : 0;
}
}

Guard our_guard;

PYBIND11_MODULE(emulated_gpu, module) {
  new_queue(); // the default stream
  c10::impl::device_guard_impl_registry[size_t(c10::kCUDA)].store(&our_guard);
  // torch has made its own hooks by now, and keeps a reference: they get our methods.
  static Hooks hooks;
  reinterpret_cast<void**>(const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()))[0] = reinterpret_cast<void**>(&hooks)[0];
  auto& library = *new torch::Library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("resize_", TORCH_FN(resize_));
  library.impl("record_stream", TORCH_FN(record_stream));
  library.impl("copy_", TORCH_FN(copy_));
  library.impl("scaled_dot_product_attention", torch::CppFunction::makeFromBoxedFunction<&run>());
  const std::set<std::string> kept{"empty", "empty_strided", "resize_", "record_stream", "copy_", "as_strided", "view",
                                   "_reshape_alias", "unfold", "set_"};
  for (auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(DispatchKey::CUDA))
    if (name.name.substr(0, 6) == "aten::" && !kept.count(name.name.substr(6)))
      library.impl((name.name + (name.overload_name.empty() ? "" : "." + name.overload_name)).c_str(),
                   torch::CppFunction::makeFromBoxedFunction<&run>());
  module.def("elapsed_ms", [](size_t begin, size_t end) {
    return our_guard.elapsedTime(reinterpret_cast<void*>(begin), reinterpret_cast<void*>(end), 0);
  });
  module.def("set_lazy", [](bool value) { lazy = value; });
  module.def("current", [] { return current; });
  module.def("exchange", [](int64_t stream) { return std::exchange(current, stream); });
  module.def("synchronize", &synchronize_all);
  module.def("is_capturing", [] { return capturing != nullptr; });
  module.def("host_register", &host_register);
  module.def("host_unregister", &host_unregister);
  module.def("is_registered", [](size_t address, size_t n) { return is_registered(reinterpret_cast<void*>(address), n); });
  module.def("launch", &launch);
  module.def("on_cpu", &on_cpu);
  pybind11::class_<Graph, std::shared_ptr<Graph>>(module, "Graph")
      .def(pybind11::init<>()).def("begin", &Graph::begin).def("end", &Graph::end).def("replay", &Graph::replay);
}
